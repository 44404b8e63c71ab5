"""Learning-rate schedules: pure functions of the step, so that there is no state to save.

Each is built with its shape and called as `schedule(step, total_steps)`, step counting from 0; it returns the factor
on the peak learning rate. Warm-up is linear: step 0 already has a rate above zero, step `warmup_steps` the peak.
"""

from __future__ import annotations

import math
from typing import Protocol

from ...kernels import ConfigError


class Schedule(Protocol):
    """A factor on the peak learning rate for each step."""

    warmup_steps: int

    def __call__(self, step: int, total_steps: int) -> float: ...


class _Warmup:
    """Linear warm-up, then whatever `after` says of the progress from 0 to 1 through the remaining steps."""

    def __init__(self, warmup_steps: int = 0, min_ratio: float = 0.0) -> None:
        if warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps={warmup_steps} is negative, allowed: 0 or more")
        if not 0.0 <= min_ratio <= 1.0:
            raise ConfigError(f"schedule.min_ratio={min_ratio} is out of range, allowed: 0 to 1")
        self.warmup_steps = warmup_steps
        self.min_ratio = min_ratio

    def __call__(self, step: int, total_steps: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.min_ratio + (1.0 - self.min_ratio) * self.after(min(progress, 1.0))

    def after(self, progress: float) -> float:
        raise NotImplementedError


class Constant(_Warmup):
    """Warm-up, then the peak rate for ever."""

    def __init__(self, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps)

    def after(self, progress: float) -> float:
        return 1.0


class Linear(_Warmup):
    """Warm-up, then a straight line to `min_ratio` of the peak."""

    def after(self, progress: float) -> float:
        return 1.0 - progress


class Cosine(_Warmup):
    """Warm-up, then half a cosine to `min_ratio` of the peak (SGDR, 1608.03983, without restarts)."""

    def after(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class WSD(_Warmup):
    """Warm-up, stable, decay (MiniCPM, 2404.06395): the peak rate, and a straight decay over the last share of steps.

    Args:
        decay_ratio: share of the steps after warm-up that decays, in (0, 1].
    """

    def __init__(self, warmup_steps: int = 0, min_ratio: float = 0.0, decay_ratio: float = 0.2) -> None:
        super().__init__(warmup_steps, min_ratio)
        if not 0.0 < decay_ratio <= 1.0:
            raise ConfigError(f"schedule.decay_ratio={decay_ratio} is out of range, allowed: above 0, up to 1")
        self.decay_ratio = decay_ratio

    def after(self, progress: float) -> float:
        return min(1.0, (1.0 - progress) / self.decay_ratio)
