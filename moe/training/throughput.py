"""Speed: tokens per second, TFLOP per second and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

# Dense bfloat16 tensor-core peaks in FLOP per second, without sparsity, from the vendors' data sheets. The first name
# that is part of the device's own name counts, so the more special names come first.
BF16_PEAKS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("B100", 1.75e15),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
    ("V100", 125e12),
    ("MI355X", 2.5e15),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
    ("MI250X", 383e12),
)


def peak_flops(device_name: str) -> float | None:
    """The dense bfloat16 peak of a device in FLOP per second; None for a device that the table does not know."""
    return next((peak for name, peak in BF16_PEAKS if name.lower() in device_name.lower()), None)


def device_peak(device: torch.device) -> float | None:
    """The peak of this process's device; None on a CPU, whose peak depends on clocks and load."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class Meter:
    """Measures steps, without the pauses for evaluation and checkpoints.

    TFLOP/s (per device) = tokens per second / devices * FLOPs per token / 1e12, where FLOPs per token counts forward
    and backward of the *active* parameters and of attention, without what activation checkpointing computes again.
    MFU = TFLOP/s / the device's dense bfloat16 peak (PaLM, 2204.02311, appendix B).

    Args:
        flops_per_token: of forward and backward.
        devices: over which the tokens of a step are spread.
        peak: of one device in FLOP per second; None for no MFU.
        window: steps over which a figure is averaged.
        clock: seconds.
    """

    def __init__(
        self,
        flops_per_token: float,
        devices: int = 1,
        peak: float | None = None,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.flops_per_token = flops_per_token
        self.devices = devices
        self.peak = peak
        self.last_seconds = 0.0  # of the latest step
        self._steps = 0
        self._clock = clock
        self._recent: deque[tuple[int, float]] = deque(maxlen=window)
        self._start = clock()

    def step(self, tokens: int) -> dict[str, float]:
        """Count a step that ends now; returns the figures of the latest steps, without the very first one."""
        now = self._clock()
        self.last_seconds, self._start = now - self._start, now
        if self._steps == 1:  # the first step also starts threads, allocates and compiles: it says nothing of others
            self._recent.clear()
        self._steps += 1
        self._recent.append((tokens, self.last_seconds))
        recent_tokens = sum(tokens for tokens, _ in self._recent)
        recent_seconds = sum(seconds for _, seconds in self._recent)
        return {
            **self.speed(recent_tokens, recent_seconds),
            "step_seconds": recent_seconds / len(self._recent),
        }

    def pause(self) -> None:
        """What happened since the last step was no training; the next step starts now."""
        self._start = self._clock()

    def speed(self, tokens: int, seconds: float) -> dict[str, float]:
        """Tokens per second, TFLOP/s and, where the peak is known, MFU."""
        rate = tokens / max(seconds, 1e-9)
        flops = rate / self.devices * self.flops_per_token
        speed = {"tokens_per_second": rate, "tflops": flops / 1e12}
        return speed if self.peak is None else {**speed, "mfu": flops / self.peak}
