"""Decisions over whole sequences, of which this rank routes a part."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from ...kernels.untraced import untraced
from ...parallel.context.zigzag import to_rank_order, to_sequence_order
from ...parallel.tensor.collectives import all_gather
from ..context import StepContext


@dataclass(frozen=True)
class SequenceParts:
    """The ranks of `StepContext.sequence_group`, each with the same number of tokens of every sequence.

    Attributes:
        group: rank cp * TP + tp.
        cp: ranks with zigzag parts among them.
        num_sequences: B.
    """

    group: dist.ProcessGroup
    cp: int
    num_sequences: int

    @classmethod
    def of(cls, context: StepContext) -> SequenceParts | None:
        """None where this rank has whole sequences."""
        if context.sequence_group is None:
            return None
        return cls(context.sequence_group, context.cp, context.num_sequences)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @untraced
    def sum(self, counts: Tensor) -> Tensor:
        """The sum over the ranks."""
        counts = counts.clone()
        dist.all_reduce(counts, group=self.group)
        return counts

    @untraced
    def whole(self, part: Tensor) -> Tensor:
        """What all ranks have, in the order of the sequences: (T, ...) -> (B * S, ...)."""
        found = all_gather(part, self.group)
        by_sequence = found.unflatten(0, (self.size, self.num_sequences, -1)).movedim(0, 1).flatten(1, 2)
        return to_sequence_order(by_sequence, 1, self.cp).flatten(0, 1)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part: (B * S, ...) -> (T, ...)."""
        by_rank = to_rank_order(whole.unflatten(0, (self.num_sequences, -1)), 1, self.cp)
        return by_rank.chunk(self.size, 1)[dist.get_rank(self.group)].flatten(0, 1)
