"""Bytes that a rank sends to others, counted from the tensors that are handed to collectives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from ....parallel.dispatchers import transfer


@dataclass
class Traffic:
    """Bytes to other ranks.

    Attributes:
        rows: of messages with rows of D elements.
        others: of all other messages: sizes, row numbers, combine weights.
    """

    width: int
    rank: int
    ranks: int
    rows: int = 0
    others: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor, remote: float) -> None:
        """Count a share of a tensor; a message of two dimensions and D columns is one of rows."""
        count = round(tensor.numel() * tensor.element_size() * remote)
        self.messages.append(name)
        if tensor.dim() == 2 and tensor.shape[1] == self.width and tensor.is_floating_point():
            self.rows += count
        else:
            self.others += count


@contextlib.contextmanager
def counted(width: int, rank: int, ranks: int) -> Iterator[Traffic]:
    """Count what dispatchers send inside, by standing in for the collectives that they call."""
    traffic = Traffic(width, rank, ranks)
    all_to_all, all_gather = dist.all_to_all_single, transfer.all_gather_single

    def count_all_to_all(out, tensor, out_splits=None, in_splits=None, **options):
        total = sum(in_splits) if in_splits else ranks
        own = in_splits[rank] if in_splits else 1
        traffic.add("all_to_all", tensor, (total - own) / max(total, 1))
        return all_to_all(out, tensor, out_splits, in_splits, **options)

    def count_all_gather(out, tensor, **options):
        traffic.add("all_gather", tensor, ranks - 1)
        return all_gather(out, tensor, **options)

    dist.all_to_all_single, transfer.all_gather_single = count_all_to_all, count_all_gather
    try:
        yield traffic
    finally:
        dist.all_to_all_single, transfer.all_gather_single = all_to_all, all_gather
