"""The table of one case: the same columns on the terminal and in Markdown."""

from __future__ import annotations

import sys

from .labels import label, mebibytes, milliseconds, number, ordered, percent, rate
from .results import ABSENT, OK, CaseResult, EntryResult

COLUMNS = ("entry", "ms", "quartiles", "/ ours", "/ (a)", "/ (b)", "TFLOP/s", "of peak", "peak MiB", "saved MiB", "")


def rows(case: CaseResult) -> list[tuple[str, ...]]:
    """One for each entry, in the order of COLUMNS."""
    return [_row(entry) for entry in ordered(case) if entry.status != ABSENT]


def title(case: CaseResult) -> str:
    """What was measured."""
    return f"{case.shape.name} {case.dtype} {case.direction}: {case.shape.text()}"


def footnote(case: CaseResult) -> str:
    """What the figures are to be held against."""
    text = f"peak: {rate(case.peak_tflops)} TFLOP/s, a square {case.dtype} matrix product in this run"
    if case.direction != "forward":
        text += f"; saved by the formula: {mebibytes(case.saved_formula)} MiB"
    absent = [label(entry) for entry in ordered(case) if entry.status == ABSENT]
    return f"{text}; not installed: {', '.join(absent)}" if absent else text


def print_case(case: CaseResult) -> None:
    """To the terminal; a pipe gets one line a row."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title(case), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("entry", "") else "right", no_wrap=name != "")
    for number_of_row, cells in enumerate(rows(case)):
        table.add_row(*cells, style="bold" if number_of_row == 0 else "dim" if cells[-1] else None)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=260, highlight=False)
    console.print(table)
    console.print(footnote(case), style="dim")
    console.print()


def markdown(case: CaseResult) -> str:
    """As a Markdown table under its title."""
    names = [name or "remark" for name in COLUMNS]
    lines = [f"**{title(case)}**", "", f"| {' | '.join(names)} |", f"|{' --- |'}{' ---: |' * 9}{' --- |'}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in rows(case)]
    return "\n".join([*lines, "", footnote(case) + "."])


def _row(entry: EntryResult) -> tuple[str, ...]:
    quartiles = f"{milliseconds(entry.q1_ms)} to {milliseconds(entry.q3_ms)}" if entry.samples else "-"
    remark = entry.note if entry.status == OK else f"{entry.status}: {entry.note}"
    return (
        label(entry),
        milliseconds(entry.median_ms),
        quartiles,
        number(entry.to_ours),
        number(entry.to_dense_a),
        number(entry.to_dense_b),
        rate(entry.tflops),
        percent(entry.share_of_peak),
        mebibytes(entry.peak_bytes),
        mebibytes(entry.saved_bytes),
        remark,
    )
