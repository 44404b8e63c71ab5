"""One shape in one dtype: build every entry, check it, count its bytes, time all of them interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .case import Case, Layer, Refused
from .check import Reference, fault, reference
from .clock import Clock, call, make_clock, time_interleaved
from .entries import Entry
from .entries.registry import LIMIT, OURS, default_backend
from .memory import SavedBytes, peak_bytes, saved_formula
from .results import ABSENT, FAILED, OK, PASSES, REFUSED, WRONG, CaseResult, EntryResult

FORWARD_SHARE = 1 / 3  # of the time for a case; a backward takes twice a forward


@dataclass
class _Contestant:
    """An entry on its way through a case: its layer while it can go on, and its result by pass."""

    entry: Entry
    layer: Layer | None
    result: EntryResult
    peak: tuple[int | None, int | None] = (None, None)

    @property
    def goes_on(self) -> bool:
        return self.layer is not None and self.result.status in (OK, WRONG)

    def stop(self, status: str, note: str) -> None:
        self.layer = None  # frees its memory
        self.result = replace(self.result, status=status, note=note)


def measure_case(
    case: Case, dtype: str, entries: Sequence[Entry], seconds: float, peak_tflops: float
) -> list[CaseResult]:
    """Forward, then forward and backward. What one entry raises ends that entry alone."""
    default = default_backend(case)
    right = reference(case)
    contestants = [_prepare(entry, case, right) for entry in _default_first(entries, default)]
    # Of our backends, those that do not serve this device are no news.
    contestants = [c for c in contestants if (c.entry.kind, c.result.status) != (OURS, REFUSED)]
    clock = make_clock(case.device)
    passes = []
    for with_backward, share in ((False, FORWARD_SHARE), (True, 1 - FORWARD_SHARE)):
        running = {c.entry.name: c for c in contestants if c.goes_on}
        calls = {name: _timed(c.layer, clock, with_backward) for name, c in running.items() if c.layer is not None}
        samples, errors = time_interleaved(calls, share * seconds)
        for name, error in errors.items():
            running[name].stop(FAILED, one_line(error))
        results = [_with_times(c, samples.get(c.entry.name, []), case, with_backward) for c in contestants]
        passes.append(
            CaseResult(
                shape=case.shape,
                dtype=dtype,
                direction=PASSES[with_backward],
                default=default,
                saved_formula=saved_formula(case.shape, case.dtype),
                peak_tflops=peak_tflops,
                entries=_with_ratios(results, default, peak_tflops),
            )
        )
    return passes


def one_line(error: Exception) -> str:
    """What a table has room for."""
    text = " ".join(str(error).split("\n")[0].split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 140 else f"{text[:139]}…"


def _default_first(entries: Sequence[Entry], default: str) -> list[Entry]:
    from .entries import all_entries

    chosen = [entry for entry in entries if entry.name != default]
    return [next(entry for entry in all_entries() if entry.name == default), *chosen]


def _prepare(entry: Entry, case: Case, right: Reference) -> _Contestant:
    """Build and call it twice forward and backward and once forward: once for its numbers, then for its memory."""
    contestant = _Contestant(entry, None, EntryResult(entry.name, entry.kind))
    if not entry.installed:
        contestant.stop(ABSENT, f"no package {entry.package}")
        return contestant
    try:
        layer = contestant.layer = entry.build(case)
        _check(contestant, layer, case, right)
        peaks = []
        for with_backward in (False, True):
            layer.clear()
            peaks.append(peak_bytes(lambda layer=layer, b=with_backward: call(layer, b), case.device))
        layer.clear()
        contestant.peak = (peaks[0], peaks[1])
    except Refused as refusal:
        contestant.stop(REFUSED, str(refusal))
    except Exception as error:
        contestant.stop(FAILED, one_line(error))
    return contestant


def _check(contestant: _Contestant, layer: Layer, case: Case, right: Reference) -> None:
    saved = SavedBytes(layer)
    with saved.counting():
        out = layer.forward()
    out.backward(layer.grad)
    error = None
    wrong = None
    if contestant.entry.kind != LIMIT:
        error = float("inf") if layer.x.grad is None else right.error(out.detach(), layer.x.grad)
        wrong = fault(layer, out, error, case.dtype)
    contestant.result = replace(
        contestant.result,
        status=OK if wrong is None else WRONG,
        note=wrong or "",
        error=error,
        saved_bytes=saved.total,
    )


def _timed(layer: Layer, clock: Clock, with_backward: bool) -> Callable[[], float]:
    def once() -> float:
        layer.clear()
        return clock.time(lambda: call(layer, with_backward))

    return once


def _with_times(contestant: _Contestant, samples: list[float], case: Case, with_backward: bool) -> EntryResult:
    result = replace(
        contestant.result,
        peak_bytes=contestant.peak[with_backward],
        saved_bytes=contestant.result.saved_bytes if with_backward else None,
    )
    if not samples or result.status not in (OK, WRONG):
        return result
    median = statistics.median(samples)
    q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (median,) * 3
    return replace(
        result,
        samples=[float(f"{sample:.5g}") for sample in samples],
        median_ms=median,
        q1_ms=q1,
        q3_ms=q3,
        tflops=case.shape.flops(with_backward) / median / 1e9,
    )


def _with_ratios(results: list[EntryResult], default: str, peak_tflops: float) -> list[EntryResult]:
    """Only what computes the right thing gets ratios."""
    medians = {result.name: result.median_ms for result in results if result.status == OK}

    def ratio(result: EntryResult, to: str) -> float | None:
        own, other = medians.get(result.name), medians.get(to)
        return own / other if own is not None and other is not None else None

    return [
        replace(
            result,
            to_ours=ratio(result, default),
            to_dense_a=ratio(result, "dense_a"),
            to_dense_b=ratio(result, "dense_b"),
            share_of_peak=result.tflops / peak_tflops if result.tflops is not None else None,
        )
        for result in results
    ]
