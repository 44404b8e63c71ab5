"""Drop-Upcycling (2502.19261): a share of each expert's neurons is drawn anew."""

from __future__ import annotations

import torch
from torch import Tensor

from .draws import generator
from .values import ChangedValues, mean_and_std


class Drop(ChangedValues):
    """New neurons are normal with the mean and standard deviation of the entries that they replace, per matrix.

    The paper permutes the neurons of each expert first, which changes nothing: neurons are drawn at random here. Not
    exact on purpose, but for share=0.
    """

    def changed(self, block: Tensor, whole: Tensor, generator_key: tuple[int | str, ...]) -> Tensor:
        mean, std = mean_and_std(block)
        return torch.empty_like(block).normal_(generator=generator(*generator_key)).mul_(std).add_(mean)

    def intent(self) -> str | None:
        if self.count == 0:
            return None
        return f"share={self.settings.share:g} of the neurons of each expert are drawn anew, on purpose"
