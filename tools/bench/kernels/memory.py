"""Bytes: the most that a call holds at once, and what autograd saves between forward and backward."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType

from .case import Layer
from .shapes import Shape


def peak_bytes(run: Callable[[], object], device: torch.device, times: int = 1) -> int:
    """The most memory that `run` holds at once beyond what was there before; its result and gradients count.

    CUDA: of the caching allocator. CPU: every allocation and release of torch's allocator, from the profiler. What
    libraries allocate by themselves (packed operands in oneDNN and MKL) is not seen.

    Args:
        times: runs, of which the least counts: where other threads free memory late, which only adds.
    """
    if device.type == "cuda":
        return min(_peak_on_cuda(run, device) for _ in range(times))
    with (
        _silent(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        for _ in range(times):
            with torch.profiler.record_function(_RUN):
                kept = run()
            del kept
    results: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    changes: list[tuple[int, int, int]] = []
    starts: list[int] = []
    for event in _with_children(results.experimental_event_tree()):
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.name == _RUN:
            starts.append(event.start_time_ns)
    return _least_peak(sorted(changes), sorted(starts))


_RUN = "scatterfold::peak_bytes"


def _peak_on_cuda(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del kept
    return peak


def _with_children(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _with_children(event.children)


def _least_peak(changes: list[tuple[int, int, int]], starts: list[int]) -> int:
    """Of changes (time, address, bytes) the most that is held after each start, and of these the least.

    What is released without having been allocated since the first start was there before, and does not count: the
    profiler reports it where an earlier measurement in this process saw its address.
    """
    peaks = [0] * len(starts)
    held: set[int] = set()
    total = at = 0
    for time, address, size in changes:
        if size > 0:
            held.add(address)
        elif address in held:
            held.remove(address)
        else:
            continue
        total += size
        while at + 1 < len(starts) and time >= starts[at + 1]:
            at += 1
        peaks[at] = max(peaks[at], total)
    return min(peaks)


class SavedBytes:
    """Counts what autograd saves within `counting()`: each memory once, weights not at all."""

    def __init__(self, layer: Layer):
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters}
        self._seen: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self._seen.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor


def saved_formula(shape: Shape, dtype: torch.dtype) -> int:
    """What our backends save: x, the pre-activation and the tables (docs/kernels.md, "What is kept").

    And 8 bytes an assignment: the order in which `Routing.from_topk` sorted the combine weights, for their gradient.
    """
    activations = dtype.itemsize * (shape.tokens * shape.width + 2 * shape.assignments * shape.expert_width)
    tables = 12 * shape.assignments + 4 * (shape.tokens + shape.experts + 2)
    return activations + tables + 8 * shape.assignments


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the profiler from writing to the terminal about memory that it did not see allocated."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
