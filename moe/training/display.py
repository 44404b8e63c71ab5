"""What a person sees while a run trains: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Record = Mapping[str, Any]
Rows = Sequence[tuple[str, str]]


class Display(Protocol):
    """Shows a run. Use it as a context manager around the whole training."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *exception: object) -> None: ...

    def header(self, rows: Rows) -> None:
        """Say once what is going to be trained on what."""
        ...

    def update(self, record: Record) -> None:
        """Show a train line or an evaluation line of metrics.jsonl."""
        ...

    def message(self, text: str) -> None:
        """Say something out of turn."""
        ...


def make_display(kind: str, total_steps: int, is_main: bool) -> Display:
    """The display of this rank.

    Args:
        kind: auto, rich, plain or none, as `logger.display`.
        is_main: ranks but the main one stay silent.
    """
    if not is_main or kind == "none":
        return Silent()
    if kind == "rich" or (kind == "auto" and sys.stdout.isatty()):
        return Live(total_steps)
    return Plain(total_steps)


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def header(self, rows: Rows) -> None:
        pass

    def update(self, record: Record) -> None:
        pass

    def message(self, text: str) -> None:
        pass


class Plain(Silent):
    """One line a record, in columns, for log files and pipes."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._best: dict[int, float] = {}  # by size of the text that was measured

    def header(self, rows: Rows) -> None:
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            self.message(f"{name:<{width}}  {text}")

    def update(self, record: Record) -> None:
        position = f"step {record['step']:>{len(str(self.total_steps))}}/{self.total_steps}"
        if "valid_loss" in record:
            text = record["valid_tokens"]
            is_best = record["valid_loss"] < self._best.get(text, math.inf)
            self._best[text] = min(record["valid_loss"], self._best.get(text, math.inf))
            self.message(f"{position} | {_evaluation(record)}{' | best' if is_best else ''}")
        else:
            cells = [f"{name} {text}".strip() for name, text in figures(record, self.total_steps)]
            self.message(" | ".join([position, *cells]))

    def message(self, text: str) -> None:
        print(text, flush=True)


class Live(Silent):
    """A panel of the latest figures under a progress bar, redrawn in place; messages scroll by above it."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

        self.total_steps = total_steps
        self.console = console or Console()
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TaskProgressColumn(), expand=True
        )
        self._task = self._bar.add_task("step", total=total_steps)
        self._figures: list[tuple[str, str]] = []
        self._evaluations: list[Record] = []
        self._live = RichLive(self._render(), console=self.console, refresh_per_second=4)

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.update(self._render(), refresh=True)
        self._live.stop()

    def header(self, rows: Rows) -> None:
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for name, text in rows:
            table.add_row(Text(name, style="bold"), Text(text))
        self.console.print(Panel(table, title="scatterfold", title_align="left", border_style="blue"))

    def update(self, record: Record) -> None:
        if "valid_loss" in record:
            self._evaluations.append(record)
        else:
            self._figures = figures(record, self.total_steps)
            self._bar.update(self._task, completed=record["step"])
        self._live.update(self._render())

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _render(self) -> RenderableType:
        from rich.columns import Columns
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        cells = [Text.assemble((f"{name} " if name else "", "dim"), (text, "bold")) for name, text in self._figures]
        rows: list[RenderableType] = [self._bar, Columns(cells, padding=(0, 3), equal=True)]
        if self._evaluations:
            latest = self._evaluations[-1]
            alike = [record for record in self._evaluations if record["valid_tokens"] == latest["valid_tokens"]]
            best = min(alike, key=lambda record: record["valid_loss"])
            rows.append(Text(f"step {latest['step']}: {_evaluation(latest)}", style="green"))
            if best is not latest:
                rows.append(Text(f"best at step {best['step']}: {_evaluation(best)}", style="dim"))
        return Panel(Group(*rows), border_style="blue")


def figures(record: Record, total_steps: int) -> list[tuple[str, str]]:
    """The cells of a train line that the record has figures for."""
    formats = (
        ("loss", "loss", lambda x: f"{x:.4f}"),
        ("train_bits_per_byte", "bits/byte", lambda x: f"{x:.3f}"),
        ("lr", "lr", lambda x: f"{x:.2e}"),
        ("grad_norm", "grad norm", lambda x: f"{x:.3f}"),
        ("tokens_per_second", "tokens/s", lambda x: f"{x:,.0f}"),
        ("tflops", "", lambda x: f"{x:.3g} TFLOP/s" if x >= 0.1 else f"{1000 * x:.3g} GFLOP/s"),
        ("mfu", "MFU", lambda x: f"{x:.1%}"),
        ("experts/max_violation", "busiest expert", lambda x: f"{1 + x:.2f}x mean"),
        ("experts/dropped_fraction", "dropped", lambda x: f"{x:.2%}" if x else ""),
        ("skipped_steps", "skipped steps", lambda x: str(x) if x else ""),
    )
    cells = [(name, shape(record[key])) for key, name, shape in formats if record.get(key) is not None]
    if "step_seconds" in record:
        cells.append(("ETA", duration((total_steps - record["step"]) * record["step_seconds"])))
    return [(name, text) for name, text in cells if text]


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def quantity(number: float) -> str:
    """A count for people: 1234567 as 1.23M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _evaluation(record: Record) -> str:
    return (
        f"validation loss {record['valid_loss']:.4f} | perplexity {record['perplexity']:.2f} | "
        f"{record['bits_per_byte']:.4f} bits/byte on {quantity(record['valid_tokens'])} tokens"
    )
