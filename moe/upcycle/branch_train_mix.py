"""Branch-Train-MiX (2403.07816): several fine-tunes of one dense model become the experts of one MoE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...parallel.checkpoint.lazy import Index, LazyTensor
from .matrices import Matrices
from .method import Method


class BranchTrainMix(Method):
    """Each source's MLPs are experts, E / M each where there are M sources; all other weights are averaged.

    The average of several models is none of them, so only equal sources give an exact start.
    """

    many = True

    def cut(self, mlps: Sequence[Matrices], layer: int, expert: int) -> Matrices:
        return mlps[expert // (self.settings.experts // len(mlps))]

    def merged(self, tensors: Sequence[LazyTensor]) -> LazyTensor:
        return average(tensors)

    def intent(self) -> str | None:
        if self.sources == 1:
            return None
        return f"all weights but the experts' are the mean of {self.sources} sources"


def average(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The mean of tensors of one shape, summed in float32 and rounded once."""
    first = tensors[0]
    if len(tensors) == 1:
        return first

    def fetch(index: Index) -> Tensor:
        total = first.read(index).to(torch.promote_types(first.dtype, torch.float32))
        for tensor in tensors[1:]:
            total += tensor.read(index)
        return (total / len(tensors)).to(first.dtype)

    return LazyTensor(first.shape, first.dtype, fetch)
