"""How entries and figures are written for people."""

from __future__ import annotations

from .results import OK, CaseResult, EntryResult

LABELS = {
    "dense_a": "dense (a)",
    "dense_b": "dense (b)",
    "pipeline": "gather + F.grouped_mm",
    "transformers_eager": "transformers eager",
    "transformers_batched_mm": "transformers batched_mm",
    "transformers_grouped_mm": "transformers grouped_mm",
    "deepspeed": "DeepSpeed MoE",
    "scattermoe": "ScatterMoE",
    "sonicmoe": "SonicMoE",
    "megablocks": "MegaBlocks",
    "liger": "Liger-Kernel",
}
ORDER = {"ours": 0, "limit": 1, "peer": 2}


def label(entry: EntryResult) -> str:
    """The entry's name in a table."""
    return f"ours: {entry.name}" if entry.kind == "ours" else LABELS.get(entry.name, entry.name)


def ordered(case: CaseResult) -> list[EntryResult]:
    """The default backend, our others, the limits, the peers; the fastest first, and last what has no rank."""

    def place(entry: EntryResult) -> tuple:
        return (
            ORDER[entry.kind],
            entry.name != case.default,
            entry.status != OK,
            entry.median_ms if entry.median_ms is not None else float("inf"),
            entry.name,
        )

    return sorted(case.entries, key=place)


def number(value: float | None, digits: int = 2) -> str:
    """Fixed digits after the point; a dash for nothing."""
    return "-" if value is None else f"{value:,.{digits}f}"


def milliseconds(value: float | None) -> str:
    """Three digits or more that mean something."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rate(value: float | None) -> str:
    """TFLOP/s."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share."""
    return "-" if value is None else f"{100 * value:.0f}%"


def mebibytes(value: int | None) -> str:
    """Bytes in units of 2^20."""
    if value is None:
        return "-"
    return f"{value / 2**20:,.1f}" if value >= 10 * 2**20 else f"{value / 2**20:.3g}"
