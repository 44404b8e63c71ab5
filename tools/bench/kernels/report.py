"""What is made of the figures: kernels.json, kernels.md, kernels.png, and the tables of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ....kernels import ConfigError, DataError
from ...files import write_atomically
from .labels import LABELS, label, mebibytes, milliseconds, number, ordered, percent, rate
from .results import OK, PASSES, CaseResult, EntryResult, Run, write_results
from .table import markdown

BEGIN, END = "<!-- scatterfold bench kernels: begin -->", "<!-- scatterfold bench kernels: end -->"


def write_report(runs: list[Run], output: Path, page: Path | None) -> list[Path]:
    """Write all files; returns their paths.

    Args:
        output: folder, made if it is missing.
        page: a Markdown file whose text between two marker lines is replaced by the tables of ratios.

    Raises: ConfigError if a file cannot be written; DataError if there is nothing to show or the page has no markers.
    """
    from .figure import save_figure

    if not any(run.cases for run in runs):
        raise DataError("source holds no measured case, allowed: files of a run that measured something")
    before = None if page is None else _read_page(page)
    make_folder(output)
    write_results(output / "kernels.json", runs)
    details = "\n\n".join(markdown(case) for run in runs for case in run.cases)
    write_atomically(
        output / "kernels.md", f"# Expert kernels, measured\n\n{summary(runs)}\n\n## All figures\n\n{details}\n"
    )
    written = [output / "kernels.json", output / "kernels.md", save_figure(runs, output / "kernels.png")]
    if page is not None and before is not None:
        head, tail = before
        write_atomically(page, f"{head}{BEGIN}\n\n{summary(runs)}\n\n{END}{tail}")
        written.append(page)
    return written


def make_folder(folder: Path) -> None:
    """Raise ConfigError if there is no such folder and none can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or "unknown").lower()
        raise ConfigError(f"output={folder} cannot be made ({reason}), allowed: a folder") from error


def _read_page(page: Path) -> tuple[str, str]:
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"page={page} cannot be read ({type(error).__name__}), allowed: a Markdown file") from None
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise DataError(f"page={page} has no place for the tables, allowed: a page with the lines {BEGIN} and {END}")
    return head, tail


def summary(runs: list[Run]) -> str:
    """Tables of ratios with the conditions beside them, in Markdown."""
    return "\n\n".join(part for run in runs for part in _summary_of(run))


def _summary_of(run: Run) -> list[str]:
    conditions = run.conditions
    versions = ", ".join(f"{name} {version}" for name, version in conditions.versions.items())
    threads = "" if conditions.device_type == "cuda" else f", {conditions.threads} threads"
    where = (
        f"Measured on {conditions.device}{threads}; {versions}; {conditions.routing} routing, seed {conditions.seed}."
    )
    parts = [where, "```\n" + "\n".join(run.commands) + "\n```"]
    for direction in PASSES:
        cases = [case for case in run.cases if case.direction == direction]
        if cases:
            parts += [f"**{direction.capitalize()}.** {_EXPLAINED}", _ratios(cases)]
    cases = [case for case in run.cases if case.direction == PASSES[1]]
    if cases:
        parts += [
            f"**Memory of forward+backward, MiB: most held at once / saved for backward.** {_MEMORY}",
            _memory(cases),
        ]
    return parts


_EXPLAINED = (
    "Time of ours over the dense limits (below 1: ours is faster), and time of the others over ours "
    "(above 1: ours is faster)."
)
_MEMORY = "Weights and inputs are left out, gradients count as held."


def _ratios(cases: Sequence[CaseResult]) -> str:
    others = _others(cases)
    head = ["shape", "dtype", "ours", "ms", "TFLOP/s", "of peak", "ours / (a)", "ours / (b)"]
    rows = []
    for case in cases:
        by_name = {entry.name: entry for entry in case.entries}
        own = by_name[case.default]
        rows.append(
            [case.shape.name, case.dtype, case.default, milliseconds(own.median_ms), rate(own.tflops)]
            + [percent(own.share_of_peak), number(own.to_dense_a), number(own.to_dense_b)]
            + [_ratio(by_name.get(name)) for name in others]
        )
    return _table([*head, *others.values()], rows, text_columns=3)


def _ratio(entry: EntryResult | None) -> str:
    if entry is None:
        return ""
    return number(entry.to_ours) if entry.status == OK else entry.status


def _memory(cases: Sequence[CaseResult]) -> str:
    others = _others(cases)
    rows = []
    for case in cases:
        by_name = {entry.name: entry for entry in case.entries}
        names = [case.default, "dense_a", "dense_b", *others]
        cells = [_bytes(by_name.get(name)) for name in names]
        rows.append([case.shape.name, case.dtype, mebibytes(case.saved_formula), *cells])
    head = ["shape", "dtype", "saved, by the formula", "ours", LABELS["dense_a"], LABELS["dense_b"]]
    return _table([*head, *others.values()], rows, text_columns=2)


def _bytes(entry: EntryResult | None) -> str:
    if entry is None:
        return ""
    if entry.status != OK:
        return entry.status
    return f"{mebibytes(entry.peak_bytes)} / {mebibytes(entry.saved_bytes)}"


def _others(cases: Sequence[CaseResult]) -> dict[str, str]:
    """Peers and our other backends that were measured in any of the cases, by name, with their labels."""
    found: dict[str, str] = {}
    for case in cases:
        for entry in ordered(case):
            if entry.kind != "limit" and entry.name != case.default and entry.samples:
                found[entry.name] = label(entry)
    return found


def _table(head: list[str], rows: list[list[str]], text_columns: int) -> str:
    rule = [" --- "] * text_columns + [" ---: "] * (len(head) - text_columns)
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
