"""The report of a run, made from nothing but its folder."""

from __future__ import annotations

from pathlib import Path

from .history import read_history


def write_report(run_dir: Path) -> Path:
    """Write RUN/report: report.html with everything in it, and its pictures as PNG files.

    Returns: the path of report.html.
    """
    from .figures import save_figures
    from .html import render_html

    history = read_history(run_dir)
    folder = Path(run_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    figures = save_figures(history, folder)
    page = folder / "report.html"
    page.write_text(render_html(history, figures), encoding="utf-8")
    return page
