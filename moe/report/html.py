"""RUN/report/report.html: one file with everything in it, to be opened, mailed or archived."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from .history import BASELINE_NAMES, RunHistory

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } tr.model td { font-weight: bold; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .85rem; } .quiet { color: #666; }
"""


def render_html(history: RunHistory, figures: list[tuple[str, Path]]) -> str:
    """The page of a run, pictures embedded."""
    summary = history.summary
    parts = [
        f"<h1>{escape(history.name)}</h1>",
        f"<p class=quiet>{escape(str(history.environment.get('started', '')))}</p>",
        _table(_facts(summary, history.environment)),
    ]
    if summary.get("bits_per_byte") is not None and summary.get("baselines"):
        parts += ["<h2>Validation text, bits per byte</h2>", _baselines(summary)]
    for title, path in figures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts += [f"<h2>{escape(title)}</h2>", f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">']
    parts += ["<h2>Configuration</h2>", f"<pre>{escape(history.config)}</pre>"]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(history.name)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _facts(summary: dict[str, Any], environment: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [(name, text) for name, text in summary.get("facts", [])]
    for key, name, form in (
        ("valid_loss", "validation loss", "{:.4f}"),
        ("perplexity", "perplexity", "{:.3f}"),
        ("bits_per_byte", "bits per byte", "{:.4f}"),
        ("tokens_per_second", "tokens per second", "{:,.0f}"),
        ("mfu", "MFU", "{:.1%}"),
        ("skipped_steps", "skipped steps", "{}"),
    ):
        if summary.get(key) is not None:
            facts.append((name, form.format(summary[key])))
    packages = environment.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in ("scatterfold", "torch") if name in packages)
    git = environment.get("git") or {}
    if versions:
        facts.append(("software", f"{versions}, Python {environment.get('python', '?')}"))
    if git:
        facts.append(("git", git["commit"][:12] + (" with changes" if git.get("changed") else "")))
    if environment.get("command"):
        facts.append(("command", " ".join(environment["command"])))
    return facts


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{cells}</table>"


def _baselines(summary: dict[str, Any]) -> str:
    baselines: dict[str, float] = summary["baselines"]
    rows = [(BASELINE_NAMES.get(name, name), bits, "") for name, bits in baselines.items()]
    rows.append(("this model", summary["bits_per_byte"], ' class="model"'))
    cells = "".join(
        f'<tr{mark}><td>{escape(name)}</td><td class="number">{bits:.4f}</td></tr>'
        for name, bits, mark in sorted(rows, key=lambda row: -row[1])
    )
    return f"<table>{cells}</table>"
