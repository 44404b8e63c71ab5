"""Layouts as a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ...moe.estimate import KINDS, PARTS, SIZES, Candidate
from .cost import Cost

_SHORT = {"parameters": "params", "gradients": "grads", "optimizer": "optim", "activations": "activ"}
_SHORT |= {"fsdp gather": "gather", "fsdp scatter": "scatter"}


def print_table(found: Sequence[Candidate], cost: Cost, of: int) -> None:
    """One row a layout: sizes above 1, memory by part, bytes sent by kind, time."""
    from rich.console import Console
    from rich.table import Table

    rows = [_row(rank, candidate, cost) for rank, candidate in enumerate(found, start=1)]
    columns = [name for name in rows[0] if any(row[name] not in ("", "-") for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="")
    for name in columns:
        table.add_column(name, justify="left" if name in ("layout", "fits") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    # As wide as it is: a table that is cut says nothing, and a file has no width.
    Console(highlight=False, width=None if sys.stdout.isatty() else 400).print(table)
    if of > len(found):
        print(f"… {of - len(found)} more layouts (top={of} lists all, json=FILE has them)")
    print("Memory of the fullest rank in GiB. Sent: GB (10^9 bytes) of a rank in a step, between machines in brackets.")


def _row(rank: int, candidate: Candidate, cost: Cost) -> dict[str, str]:
    layout, time = candidate.layout, candidate.time
    words = [f"{name}={getattr(layout, name)}" for name in SIZES if getattr(layout, name) > 1]
    row = {
        "": str(rank),
        "layout": " ".join(words) or "one rank",
        "fits": "no" if candidate.refused else "yes",
        "tokens/s": f"{time.tokens_per_second:,.0f}",
        "MFU": f"{time.mfu:.1%}",
        "step s": f"{time.total:.3g}",
        "arithmetic": f"{time.arithmetic:.3g}",
        "waits": f"{sum(time.messages.values()):.3g}",
        "idle": f"{time.idle:.3g}" if time.idle else "-",
        "memory": f"{candidate.memory.total / 2**30:.3g}",
    }
    row |= {_SHORT.get(part, part): _gibibytes(getattr(candidate.memory, part)) for part in PARTS}
    for kind in KINDS:
        inside, between = candidate.volume[kind]["inside"], candidate.volume[kind]["between"]
        sent = f"{(inside + between) / 1e9:.3g}" if inside + between else "-"
        row[f"sent: {_SHORT.get(kind, kind)}"] = sent + (f" ({between / 1e9:.3g})" if between else "")
    hours, price = cost.hours(time), cost.price(time)
    row["hours"] = "" if hours is None else f"{hours:,.1f}"
    row["cost"] = "" if price is None else f"{price:,.0f}"
    return row


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.2g}" if size else "-"
