"""The tables as a Markdown page; prose that stands outside of the two markers stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files import write_atomically
from .arms import ARMS, DENSE
from .speed import SCORING, WRITING

BEGIN, END = "<!-- scatterfold bench upcycling: begin -->", "<!-- scatterfold bench upcycling: end -->"


def write_page(whole: dict[str, Any], path: Path) -> Path:
    """Write a new page, or what is between the markers of the one that is there. Raises: ConfigError."""
    text = (
        path.read_text(encoding="utf-8") if path.exists() else f"# Upcycling against its alternatives\n\n{BEGIN}{END}\n"
    )
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        head, tail = f"{text.rstrip()}\n\n", "\n"  # a page of somebody's own: add to it
    write_atomically(path, f"{head}{BEGIN}\n\n{tables(whole)}\n\n{END}{tail}")
    return path


def tables(whole: dict[str, Any]) -> str:
    """Conditions, results, models and inference."""
    parts = [_conditions(whole), _results(whole), "![Curves and gains](upcycling.png)", _pays(whole), _models(whole)]
    if whole["speed"] is not None:
        parts.append(_speed(whole))
    return "\n\n".join(parts)


def _conditions(whole: dict[str, Any]) -> str:
    where, settings = whole["conditions"], whole["settings"]
    base = next(iter(whole["results"]["dense_training"].values()))
    said = (
        f"`{whole['command']}` on {where['device']}, torch {where['torch']}, Python {where['python']}; "
        f"seeds {', '.join(map(str, settings['seeds']))}. The dense model, trained for {settings['steps']:,} steps of "
        f"{settings['tokens_per_step']:,} tokens at a rate that does not decay, stands at {_figure(base)} bits per "
        "byte when it is continued or upcycled. Bits per byte of the whole validation text"
    )
    return f"{said}; mean ± standard deviation over seeds." if base["std"] is not None else f"{said}."


def _results(whole: dict[str, Any]) -> str:
    arms, extra = whole["results"]["arms"], whole["settings"]["extra"]
    names = [f"{budget:g}" for budget in sorted(extra)]
    rows = [["extra FLOPs / dense training's", *(f"{name} ×" for name in names)]]
    for arm, found in arms.items():
        rows.append([ARMS[arm].label, *(_figure(found["bits_per_byte"].get(name)) for name in names)])
    for arm, found in arms.items():
        for spread in found["from_scratch_with_all_flops"].values():
            label = f"{ARMS[arm].label}, with the dense training's FLOPs too"
            rows.append([label, *[""] * (len(names) - 1), _figure(spread)])
    if DENSE in arms:
        for arm, found in arms.items():
            if arm != DENSE:
                label = f"*below dense, continued*: {ARMS[arm].label}"
                rows.append([label, *(_figure(found["gain_over_dense"].get(name), "+") for name in names)])
        for arm, found in arms.items():
            for spread in found["its_gain_over_dense"].values():
                label = f"*below dense, continued*: {ARMS[arm].label}, with the dense training's FLOPs too"
                rows.append([label, *[""] * (len(names) - 1), _figure(spread, "+")])
    return _table(rows)


def _pays(whole: dict[str, Any]) -> str:
    """In words, from which budget on an arm is better than going on with the dense model."""
    lines = []
    least, most = min(whole["settings"]["extra"]), max(whole["settings"]["extra"])
    for arm, found in whole["results"]["arms"].items():
        if arm == DENSE or DENSE not in whole["results"]["arms"]:
            continue
        where = found["pays_from"]
        if where is None:
            said = f"not better than the dense model, continued, at {most:g} ×"
        elif where <= least:
            said = f"better than the dense model, continued, at every budget measured, from {least:g} × on"
        else:
            said = f"better than the dense model, continued, from about {where:.2g} × on"
        at_peak = found["pays_from_at_peak_rate"]
        said += "; on the curves at the peak rate " + ("never" if at_peak is None else f"from {at_peak:.2g} × on")
        lines.append(f"- {ARMS[arm].label}: {said}.")
    return "\n".join(lines)


def _models(whole: dict[str, Any]) -> str:
    rows = [["model", "parameters", "active for a token", "training MFLOPs per token", "steps"]]
    dense = whole["models"][DENSE]["flops_per_token"]
    for arm, model in whole["models"].items():
        ratio = f"{model['flops_per_token'] / 1e6:.3f} ({model['flops_per_token'] / dense:.3f} of dense)"
        steps = ", ".join(f"{count:,}" for count in model["steps"])
        rows.append([ARMS[arm].label, f"{model['parameters']:,}", f"{model['active']:,}", ratio, steps])
    return _table(rows)


def _speed(whole: dict[str, Any]) -> str:
    speed = whole["speed"]
    rows = [["tokens a second, one thread"], *([ARMS[arm].label] for arm in dict.fromkeys(_speed_models(speed)))]
    for what in (WRITING, SCORING):
        for batch in sorted({entry["batch"] for entry in speed["records"]}):
            here = {e["model"]: e for e in speed["records"] if e["what"] == what and e["batch"] == batch}
            rows[0].append(f"{what}, batch {batch}")
            for row, arm in zip(rows[1:], here):
                rate = here[arm]["tokens_per_second"]
                share = f" ({rate / here[DENSE]['tokens_per_second']:.2f})" if DENSE in here and arm != DENSE else ""
                row.append(f"{rate:,.0f}{share}")
    loads = f"load of the machine {speed['load_before']:.1f} before, {speed['load_after']:.1f} after"
    return _table(rows) + (
        f"\n\nMedians of {speed['rounds']} interleaved calls, in brackets the ratio to dense; {loads}."
    )


def _speed_models(speed: dict[str, Any]) -> list[str]:
    return [entry["model"] for entry in speed["records"]]


def _figure(spread: dict[str, Any] | None, sign: str = "") -> str:
    if spread is None:
        return ""
    std = "" if spread["std"] is None else f" ± {spread['std']:.4f}"
    return f"{spread['mean']:{sign}.4f}{std}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    rule = f"| --- |{' ---: |' * (len(rows[0]) - 1)}"
    return "\n".join([head, rule, *body])
