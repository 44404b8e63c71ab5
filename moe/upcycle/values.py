"""Experts whose values are changed on purpose, so that copies begin apart: what drop and noise have in common."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ...parallel.checkpoint.lazy import LazyTensor, computed
from .draws import permutation
from .matrices import Matrices
from .method import Method


class ChangedValues(Method):
    """Full copies, of which a share of the neurons is changed in gate, up and down.

    A neuron is a row of gate and up (F, D) and a column of down (D, F). `indices=shared` changes the same neurons in
    all three, so that a share 1 - r stays intact; `per_matrix` draws them for each matrix, as the code published with
    Drop-Upcycling does, and leaves (1 - r)^3 intact in all three.
    """

    @abstractmethod
    def changed(self, block: Tensor, whole: Tensor, generator_key: tuple[int | str, ...]) -> Tensor:
        """New values of the chosen neurons of one matrix, float32, of the block's shape."""

    @property
    def count(self) -> int:
        """Neurons that change."""
        return round(self.settings.share * self.ffn_width)

    def change(self, expert_mlp: Matrices, layer: int, expert: int) -> Matrices:
        if self.count == 0:
            return expert_mlp
        return expert_mlp.map(lambda name, matrix, dim: self._changed(name, matrix, dim, layer, expert))

    def chosen(self, name: str, layer: int, expert: int) -> Tensor:
        """Neurons of one matrix that change."""
        which = "neurons" if self.settings.indices == "shared" else f"neurons of {name}"
        return permutation(self.ffn_width, self.settings.seed, layer, expert, which)[: self.count]

    def _changed(self, name: str, matrix: LazyTensor, dim: int, layer: int, expert: int) -> LazyTensor:
        def whole() -> Tensor:
            values = matrix.read()
            chosen = self.chosen(name, layer, expert)
            block = values.index_select(dim, chosen).float()
            new = self.changed(block, values, (self.settings.seed, layer, expert, name))
            return values.index_copy_(dim, chosen, new.to(values.dtype))

        return computed(matrix.shape, matrix.dtype, whole)


def mean_and_std(values: Tensor) -> tuple[float, float]:
    """Of all entries, the same bits for any number of threads (which sum in parts of their own in torch)."""
    entries = values.to(torch.float64).numpy()
    return float(entries.mean()), float(entries.std())
