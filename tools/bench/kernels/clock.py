"""Time, and who is timed next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .case import Layer

LEAST, MOST = 3, 200  # calls that are timed
FLUSH_BYTES = 256 * 2**20  # more than the L2 cache of any GPU


class CpuClock:
    """Milliseconds by the wall. Between two calls of one layer the others run, so caches are as in a model."""

    def time(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        kept = run()  # freed after the clock has stopped
        elapsed = time.perf_counter() - start
        del kept
        return 1e3 * elapsed


class CudaClock:
    """Milliseconds from the first kernel to the last, by events; the L2 cache is overwritten before.

    While the device overwrites it, the host already launches, as it does in a model. Where a layer waits for the
    device, the device waits for it, and that counts.
    """

    def __init__(self, device: torch.device):
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def time(self, run: Callable[[], object]) -> float:
        self._flush.zero_()
        self._start.record()
        kept = run()
        self._end.record()
        self._end.synchronize()
        del kept
        return self._start.elapsed_time(self._end)


Clock = CpuClock | CudaClock


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def call(layer: Layer, with_backward: bool) -> Tensor:
    """One forward without a graph, or one forward and backward."""
    if not with_backward:
        with torch.no_grad():
            return layer.forward()
    out = layer.forward()
    out.backward(layer.grad)
    return out.detach()


def time_interleaved(
    calls: Mapping[str, Callable[[], float]], seconds: float
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Call and time each in turn, an equal share of the seconds for each; the next is the one that used the least.

    So all are spread over the whole time, equally fast ones take turns, and a slow one does not use up the time of the
    others. Each is called at least 3 and at most 200 times; what raises is called no more.

    Args:
        calls: by name, a function that runs once and returns milliseconds.

    Returns: the times by name, and what was raised.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, Exception] = {}
    share = 1e3 * seconds / max(1, len(calls))
    while True:
        due = [
            name
            for name, times in samples.items()
            if name not in errors and (len(times) < LEAST or len(times) < MOST and sum(times) < share)
        ]
        if not due:
            return samples, errors
        name = min(due, key=lambda name: sum(samples[name]))
        try:
            samples[name].append(calls[name]())
        except Exception as error:
            errors[name] = error.with_traceback(None)  # whose frames would hold the layer's memory


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of large square matrix products: the best size, its median."""
    clock = make_clock(device)
    best = 0.0
    for size in (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        torch.mm(left, right)  # the first call sets up libraries
        times = sorted(clock.time(lambda a=left, b=right: torch.mm(a, b)) for _ in range(5))
        best = max(best, 2 * size**3 / times[2] / 1e9)
    return best
