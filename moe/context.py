"""What one forward pass must know about the optimizer step of which it is a part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

    from .training.router_statistics import RouterStatistics


@dataclass(frozen=True)
class StepContext:
    """Passed from the training loop through the model to every MoE layer.

    Attributes:
        num_sequences: the T tokens of this pass are num_sequences sequences of T / num_sequences tokens each.
        global_tokens: tokens of the whole optimizer step, over all micro-batches and data-parallel ranks; None
            when this pass is the whole step.
        statistics: collects router statistics of the step; None to collect nothing (inference).
        sequence_group: the ranks that hold parts of the same sequences, cp x tp of them; None where this rank holds
            whole sequences. Set by the model, which cuts the sequences; each rank's T tokens are then its parts.
        cp: context-parallel ranks among them, whose parts are `parallel.context.zigzag`; set with sequence_group.
    """

    num_sequences: int = 1
    global_tokens: int | None = None
    statistics: RouterStatistics | None = None
    sequence_group: dist.ProcessGroup | None = None
    cp: int = 1


ALONE = StepContext()
