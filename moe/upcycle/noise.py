"""Copies with noise: the simplest way to let experts begin apart (a baseline of 2502.19261)."""

from __future__ import annotations

import torch
from torch import Tensor

from .draws import generator
from .values import ChangedValues, mean_and_std


class Noise(ChangedValues):
    """Adds N(0, (noise_std * s)^2) to a share of the neurons, s being the standard deviation of the matrix.

    The code published with Drop-Upcycling adds N(0, 0.02^2) to half of them, whatever the size of the weights: about
    noise_std=1 for matrices drawn with 0.02. Not exact on purpose, but for share=0 or noise_std=0.
    """

    @property
    def count(self) -> int:
        return super().count if self.settings.noise_std > 0 else 0

    def changed(self, block: Tensor, whole: Tensor, generator_key: tuple[int | str, ...]) -> Tensor:
        std = self.settings.noise_std * mean_and_std(whole)[1]
        return torch.empty_like(block).normal_(generator=generator(*generator_key)).mul_(std).add_(block)

    def intent(self) -> str | None:
        if self.count == 0:
            return None
        share, std = self.settings.share, self.settings.noise_std
        return f"share={share:g} of the neurons of each expert carry noise of noise_std={std:g}, on purpose"
