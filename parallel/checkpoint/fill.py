"""Fill a live model from tensors of any format, each rank only its own part of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..process import together
from ..shards import local_part, local_range
from .lazy import LazyTensor
from .read import check_shapes


def fill(
    state: Mapping[str, Tensor], tensors: Mapping[str, LazyTensor], source: Path, elsewhere: Collection[str] = ()
) -> None:
    """Read tensors in place, converting their dtype; a sharded one gets the part that this rank holds.

    Every rank must call it. No rank reads before all have found that names and shapes fit.

    Args:
        state: live tensors, plain or distributed.
        tensors: what to read, by the same names.
        source: where they come from; errors name it.
        elsewhere: names of tensors that other ranks hold: those of other pipeline stages.

    Raises: CheckpointError, on every rank: with nothing changed if they do not fit, or if one cannot be read.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    together(lambda: check_shapes(source, shapes, state, elsewhere))
    together(lambda: _read(state, tensors))


@torch.no_grad()
def _read(state: Mapping[str, Tensor], tensors: Mapping[str, LazyTensor]) -> None:
    for name, tensor in state.items():
        held = [local_range(tensor, dim) for dim in range(tensor.ndim)]
        local_part(tensor).copy_(tensors[name].read(held))
