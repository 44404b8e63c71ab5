"""`scatterfold layout`: which rank is where, and who communicates with whom about what."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .arguments import argument
from .subcommands import run_command

if TYPE_CHECKING:
    from ..parallel.layout import ResolvedLayout


@dataclass(frozen=True)
class LayoutCommand:
    """Show a parallel layout: which rank is where in both grids, and what its groups communicate.

    Sizes are those of the config group `layout`. Nothing is started; a layout that does not work out is refused with
    the product that does not.
    """

    EXAMPLE: ClassVar[str] = "scatterfold layout world=64 dp_shard=8 tp=4 ep=8 gpus_per_node=8"

    world: int = argument("number of ranks (GPUs)", least=1)
    dp_replicate: int | None = argument("copies of the model; as many as the world allows if not given", default=None)
    dp_shard: int = argument("ranks over which FSDP cuts one copy", default=1)
    cp: int = argument("ranks over which a sequence is cut", default=1)
    tp: int = argument("ranks over which attention and dense MLPs are cut", default=1)
    pp: int = argument("pipeline stages", default=1)
    ep: int = argument("ranks over which experts are spread", default=1)
    etp: int = argument("ranks over which each expert is cut", default=1)
    gpus_per_node: int | None = argument(
        "say which groups stay within a machine of so many ranks", default=None, least=1
    )
    rows: int = argument("most ranks to list", default=64, least=0)
    json: Path | None = argument("also write all ranks and groups to this file", default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(LayoutCommand, _run, argv)


def _run(settings: LayoutCommand) -> int:
    from ..parallel.layout import ATTENTION_SIZES, EXPERT_SIZES, Layout
    from .files import check_target, write_atomically

    check_target(settings.json)
    sizes = {name: getattr(settings, name) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp")}
    layout = Layout(**sizes).resolve(settings.world)
    ranks, groups = _ranks(layout, settings.gpus_per_node), _groups(layout, settings.gpus_per_node)
    print(f"{layout.world} ranks")
    for title, names in (("attention", ATTENTION_SIZES), ("experts", EXPERT_SIZES)):
        print(f"  {title:<10} " + " x ".join(f"{name} {getattr(layout, name)}" for name in names))
    print(f"  {'':<10} edp {layout.edp} = {layout.edp_replicate} copies x {layout.edp_shard} ranks that share one\n")
    print(_table(ranks[: settings.rows]))
    if len(ranks) > settings.rows:
        print(f"… {len(ranks) - settings.rows} more ranks (rows={len(ranks)} lists all)")
    if groups:
        shown = [{key: _short(value) for key, value in group.items() if key != "groups"} for group in groups]
        print(f"\n{_table(shown)}")
    if settings.json is not None:
        resolved = {**asdict(layout), "world": layout.world, "edp": layout.edp}
        resolved |= {"edp_replicate": layout.edp_replicate, "edp_shard": layout.edp_shard}
        document = {"layout": resolved, "ranks": ranks, "communication": groups}
        write_atomically(settings.json, json.dumps(document, indent=1) + "\n")
    return 0


def _ranks(layout: ResolvedLayout, gpus_per_node: int | None) -> list[dict[str, Any]]:
    found = []
    for rank in range(layout.world):
        node = {} if gpus_per_node is None else {"node": rank // gpus_per_node}
        place = asdict(layout.coordinates(rank))
        found.append({"rank": rank, **node, **place, "batch share": layout.data_rank(rank)})
    return found


def _groups(layout: ResolvedLayout, gpus_per_node: int | None) -> list[dict[str, Any]]:
    from ..parallel.communication.by_group import communications

    everyone = {**layout.groups(), "world": [list(range(layout.world))]}
    found = []
    for message in communications(layout):
        groups = everyone[message.group]
        inside = {}
        if gpus_per_node is not None:
            staying = sum(group[0] // gpus_per_node == group[-1] // gpus_per_node for group in groups)
            inside = {"in a node": "all" if staying == len(groups) else f"{staying} of {len(groups)}"}
        found.append(
            {
                "group": message.group,
                "size": len(groups[0]),
                "first group": groups[0],
                **inside,
                "collective": message.collective,
                "what": message.what,
                "when": message.when,
                "groups": groups,
            }
        )
    return found


def _short(value: Any) -> str:
    """A list of ranks as `0-3`, `0,4,8` or `0,4,…,60`."""
    if not isinstance(value, list):
        return str(value)
    if len(value) > 2 and value == list(range(value[0], value[-1] + 1)):
        return f"{value[0]}-{value[-1]}"
    return ",".join(map(str, value)) if len(value) <= 4 else f"{value[0]},{value[1]},…,{value[-1]}"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns under their names; numbers to the right."""
    if not rows:
        return ""
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    right = [all(isinstance(row[name], int) for row in rows) for name in names]
    lines = []
    for line in cells:
        padded = [
            text.rjust(width) if to_right else text.ljust(width) for text, width, to_right in zip(line, widths, right)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
