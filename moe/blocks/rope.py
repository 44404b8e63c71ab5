"""Rotary position embeddings (2104.09864) and the scalings that stretch them to longer contexts.

Channels i and i + W/2 of a head of width W turn together by the angle position * theta^(-2i/W) (Hugging Face's order).
A scaling changes the frequencies, and yarn also the length of the turned vectors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import ConfigError


class RopeScaling(ABC):
    """Changes the frequencies of RoPE for contexts longer than those the model was trained on."""

    @abstractmethod
    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """New frequencies: (W/2,) float64 -> (W/2,)."""

    @property
    def magnitude(self) -> float:
        """Factor on the length of queries and of keys."""
        return 1.0

    @property
    def latent_factor(self) -> float:
        """Factor on the logits of latent attention, of which only a part of the channels turns."""
        return 1.0


def _check_factor(factor: float) -> None:
    if not factor >= 1.0:
        raise ConfigError(f"model.rope_scaling.factor={factor} is out of range, allowed: 1 or more")


def _check_original(positions: int) -> None:
    if positions < 1:
        raise ConfigError(f"model.rope_scaling.original_positions={positions} is too small, allowed: 1 or more")


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Position interpolation (2306.15595): every frequency divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a linear blend between.

    A frequency is low if it makes fewer than `low_freq_factor` turns over `original_positions`, and high if it makes
    more than `high_freq_factor`.
    """

    factor: float
    original_positions: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original(self.original_positions)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"model.rope_scaling.low_freq_factor={self.low_freq_factor} is out of range, allowed: above 0, below "
                f"high_freq_factor={self.high_freq_factor}"
            )

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        turns = frequencies * self.original_positions / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (2309.00071): channels that turn often are kept, slow ones interpolated, a ramp over channels between.

    Attributes:
        factor: how many times longer the context becomes.
        original_positions: context of pre-training.
        beta_fast, beta_slow: turns over `original_positions` at which the ramp starts and ends.
        attention_factor: factor on queries and keys; None for 0.1 ln(factor) + 1 (section 3.4).
        mscale, mscale_all_dim: DeepSeek's form of that factor: the quotient of 0.1 m ln(factor) + 1 for the two. Where
            attention is latent, the square of that for mscale_all_dim is a factor on the logits.
        truncate: round the ends of the ramp outwards to whole channels.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original(self.original_positions)
        if not 0 < self.beta_slow < self.beta_fast:
            raise ConfigError(
                f"model.rope_scaling.beta_slow={self.beta_slow} is out of range, allowed: above 0, below "
                f"beta_fast={self.beta_fast}"
            )

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        half = frequencies.numel()
        first, last = self._channel(self.beta_fast, half, theta), self._channel(self.beta_slow, half, theta)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        width = last - first if last != first else 0.001
        interpolated = ((torch.arange(half, dtype=frequencies.dtype) - first) / width).clamp(0.0, 1.0)
        return frequencies * (1 - interpolated + interpolated / self.factor)

    def _channel(self, turns: float, half: int, theta: float) -> float:
        """The (fractional) channel whose frequency makes that many turns over the original context."""
        return half * math.log(self.original_positions / (turns * 2 * math.pi)) / math.log(theta)

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    @property
    def latent_factor(self) -> float:
        return self._temperature(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosines and sines of consecutive positions, (S, 1, W) float32, the two halves of a head alike.

    A plain object rather than a pair of tensors, so that an engine that casts a block's inputs to half precision leaves
    the angles alone.
    """

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Turn queries or keys: (B, S, H, W) -> (B, S, H, W), computed in float32. Channels beyond the angles' stay."""
        turned = self.cos.shape[-1]
        if turned < x.shape[-1]:
            return torch.cat((self(x[..., :turned]), x[..., turned:]), -1)
        first, second = x.chunk(2, dim=-1)
        quarter_turn = torch.cat((-second, first), dim=-1)
        return (x * self.cos + quarter_turn * self.sin).to(x.dtype)


class RotaryTable:
    """The angles of a model, computed at first use on each device.

    Not a module: there is nothing to train, to save, or to materialise after a build on the meta device.
    """

    def __init__(self, width: int, theta: float, max_positions: int, scaling: RopeScaling | None = None) -> None:
        self.width = width
        self.theta = theta
        self.max_positions = max_positions
        self.scaling = scaling
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def frequencies(self) -> Tensor:
        """Radians per position of each pair of channels, (W/2,) float64."""
        exponent = torch.arange(0, self.width, 2, dtype=torch.float64, device="cpu") / self.width
        frequencies = self.theta**-exponent
        return frequencies if self.scaling is None else self.scaling.scale(frequencies, self.theta)

    def __call__(self, start: int, length: int, device: torch.device) -> Rotation:
        """The rotation of positions start .. start + length - 1."""
        if device not in self._tables:
            self._tables[device] = self._make(device)
        cos, sin = self._tables[device]
        return Rotation(cos[start : start + length], sin[start : start + length])

    def _make(self, device: torch.device) -> tuple[Tensor, Tensor]:
        magnitude = 1.0 if self.scaling is None else self.scaling.magnitude
        position = torch.arange(self.max_positions, dtype=torch.float64, device="cpu")
        angle = torch.outer(position, self.frequencies()).repeat(1, 2).unsqueeze(1)
        return (angle.cos() * magnitude).float().to(device), (angle.sin() * magnitude).float().to(device)
