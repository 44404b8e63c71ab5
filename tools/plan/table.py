"""Layouts as a table, and the best of them in detail."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ...moe.estimate import KINDS, SIZES, Candidate
from .cost import Cost


def print_table(found: Sequence[Candidate], cost: Cost, of: int) -> None:
    """One row a layout: sizes above 1, time, memory, bytes sent, cost."""
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
    Console(highlight=False, width=None if sys.stdout.isatty() else 250).print(table)
    if of > len(found):
        print(f"… {of - len(found)} more layouts (top={of} lists all, json=FILE has them)")
    print("Memory of the fullest rank in GiB; sent by a rank in a step in GB, inside a machine and between machines.")


def details(candidate: Candidate) -> str:
    """What one layout's memory, time and messages consist of."""
    memory, time = candidate.memory, candidate.time
    parts = ", ".join(f"{name} {_gibibytes(size)}" for name, size in memory.by_part().items() if size)
    waits = ", ".join(f"{kind} {seconds:.3g}" for kind, seconds in time.messages.items() if seconds >= 5e-4)
    sent = ", ".join(f"{kind} {_sent(candidate, kind)}" for kind in KINDS if sum(candidate.volume[kind].values()))
    lines = [
        f"{layout_words(candidate) or 'one rank'} in detail:",
        f"  memory, GiB  {parts}; at the {memory.moment}",
        f"  step, s      arithmetic {time.arithmetic:.3g}, update {time.update:.3g}"
        + (f", idle {time.idle:.3g}" if time.idle else "")
        + (f", waits for {waits}" if waits else ""),
        f"  sent, GB     {sent or 'nothing'}",
    ]
    return "\n".join(lines)


def layout_words(candidate: Candidate) -> str:
    """A layout as words of a command; nothing for one rank."""
    sizes = ((name, getattr(candidate.layout, name)) for name in SIZES)
    return " ".join(f"{name}={size}" for name, size in sizes if size > 1)


def _row(rank: int, candidate: Candidate, cost: Cost) -> dict[str, str]:
    time, memory = candidate.time, candidate.memory
    inside, between = (sum(places[where] for places in candidate.volume.values()) for where in ("inside", "between"))
    hours, price = cost.hours(time), cost.price(time)
    state = memory.parameters + memory.gradients + memory.optimizer
    return {
        "": str(rank),
        "layout": layout_words(candidate) or "one rank",
        "fits": "no" if candidate.refused else "yes",
        "tokens/s": f"{time.tokens_per_second:,.0f}",
        "MFU": f"{time.mfu:.1%}",
        "step s": f"{time.total:.3g}",
        "waits": f"{sum(time.messages.values()):.3g}",
        "idle": f"{time.idle:.3g}" if time.idle else "-",
        "memory": _gibibytes(memory.total),
        "state": _gibibytes(state),
        "activations": _gibibytes(memory.activations + memory.dispatch),
        "other": _gibibytes(memory.total - state - memory.activations - memory.dispatch),
        "sent inside": f"{inside / 1e9:.3g}" if inside else "-",
        "between": f"{between / 1e9:.3g}" if between else "-",
        "hours": "" if hours is None else f"{hours:,.1f}",
        "cost": "" if price is None else f"{price:,.0f}",
    }


def _sent(candidate: Candidate, kind: str) -> str:
    inside, between = (candidate.volume[kind][where] / 1e9 for where in ("inside", "between"))
    return f"{inside + between:.3g}" + (f" ({between:.3g} between machines)" if between else "")


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.3g}"
