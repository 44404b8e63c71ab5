"""How the ranks of a run are arranged, for attention and, folded over the same ranks, for experts.

    attention   rank = tp  + TP  * (cp + CP * (dp_shard + DP_SHARD * (dp_replicate + DP_REPLICATE * pp)))
    experts     rank = etp + ETP * (ep + EP * (edp + EDP * pp))

Both grids have the same pipeline stages; within one, TP * CP * DP_SHARD * DP_REPLICATE = ETP * EP * EDP. What
communicates most has the nearest ranks, so that it stays within a machine where it can: tensor parallel groups, and
the dispatch of tokens to experts, which may span tensor, context and data parallel ranks (MoE Parallel Folding,
2504.14960, section 3; ranks as in Megatron-Core's order tp-cp-ep-dp-pp).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..kernels.errors import ConfigError

if TYPE_CHECKING:
    from .meshes import Meshes

ATTENTION_SIZES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_SIZES = ("pp", "edp", "ep", "etp")


@dataclass(frozen=True)
class Layout:
    """World = pp x dp_replicate x dp_shard x cp x tp, and in each pipeline stage edp x ep x etp over the same ranks.

    Ranks that differ in dp_replicate or dp_shard read different shares of the global batch. 1 x N is FSDP, N x 1 is
    DDP and M x N is hybrid sharding (HSDP). Expert data parallelism (edp) follows from the rest.

    Attributes:
        dp_replicate: copies of the model; None for as many as the world allows.
        dp_shard: ranks over which parameters, gradients and optimizer state of one copy are cut.
        cp: ranks over which one sequence is cut.
        tp: ranks over which attention, dense MLPs and the vocabulary are cut.
        pp: pipeline stages, each with its share of the layers.
        ep: ranks over which the experts of a layer are spread.
        etp: ranks over which each expert is cut.

    Raises: ConfigError for a size below 1.
    """

    dp_replicate: int | None = None
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size is not None and size < 1:
                raise ConfigError(f"layout.{name}={size} is too small, allowed: 1 or more")

    def resolve(self, world: int) -> ResolvedLayout:
        """Fill in what is None and check that the products work out.

        Raises: ConfigError that shows the product that does not work out.
        """
        sizes = {name: getattr(self, name) for name in ("dp_shard", "cp", "tp", "pp")}
        others = math.prod(sizes.values())
        if self.dp_replicate is None:
            if world % others:
                shown, several = _product(sizes)
                raise ConfigError(
                    f"{shown} does not divide the {_ranks(world)} of this run, "
                    f"allowed: {'products of ' if several else ''}{_divisors(world)}"
                )
        elif self.dp_replicate * others != world:
            shown, several = _product({"dp_replicate": self.dp_replicate, **sizes}, keep=("dp_replicate", "dp_shard"))
            raise ConfigError(f"{shown}, but this run has {_ranks(world)}, allowed: sizes whose product is {world}")
        stage = world // self.pp
        if stage % (self.ep * self.etp):
            shown, several = _product({"ep": self.ep, "etp": self.etp})
            of = "this run" if self.pp == 1 else "a pipeline stage"
            raise ConfigError(
                f"{shown} does not divide the {_ranks(stage)} of {of}, "
                f"allowed: {'products of ' if several else ''}{_divisors(stage)}"
            )
        return ResolvedLayout(world // others, self.dp_shard, self.cp, self.tp, self.pp, self.ep, self.etp)


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands in both grids."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    edp: int
    ep: int
    etp: int


@dataclass(frozen=True)
class ResolvedLayout:
    """A layout that fits its world. `Layout.resolve` makes it; the defaults are one process."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def world(self) -> int:
        return self.pp * self.stage

    @property
    def data(self) -> int:
        """Shares into which the global batch is cut."""
        return self.dp_replicate * self.dp_shard

    @property
    def edp(self) -> int:
        """Copies of each expert's slice, whole or cut once more."""
        return self.stage // (self.ep * self.etp)

    @property
    def edp_shard(self) -> int:
        """Ranks over which an expert's slice is cut as dp_shard cuts the other parameters.

        1, so that each of the edp ranks has a copy, where nothing is cut (dp_shard = 1) and where the experts of one
        group span several copies of the model.
        """
        inner = self.dp_shard * self.cp * self.tp
        return inner // (self.ep * self.etp) if self.dp_shard > 1 and inner % (self.ep * self.etp) == 0 else 1

    @property
    def edp_replicate(self) -> int:
        return self.edp // self.edp_shard

    @property
    def is_folded(self) -> bool:
        """Whether experts are cut or copied over other ranks than the remaining parameters."""
        return self.ep * self.etp * self.tp > 1 or self.edp_shard != self.dp_shard * self.cp

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands in both grids (see the equations at the top of this file)."""
        attention = _digits(rank, [getattr(self, name) for name in ATTENTION_SIZES])
        experts = _digits(rank, [getattr(self, name) for name in EXPERT_SIZES])
        return Coordinates(*attention, *experts[1:])

    def data_rank(self, rank: int) -> int:
        """Which share of the global batch a rank reads, of `data`."""
        at = self.coordinates(rank)
        return at.dp_replicate * self.dp_shard + at.dp_shard

    def groups(self) -> dict[str, list[list[int]]]:
        """Ranks that communicate with each other, by what for; each kind of group partitions the world.

        A group's ranks ascend, and the index in the group is the coordinate it is named after. `dp_cp` are the ranks
        over which FSDP cuts, `dispatch` exchanges tokens (index ep * ETP + etp), `sequence` holds parts of the same
        sequences (cp * TP + tp), `stage` holds the same layers.
        """
        stages = {"pp": self.pp}
        attention = {**stages, "dp_replicate": self.dp_replicate, "dp_cp": self.dp_shard * self.cp, "tp": self.tp}
        parts = {**stages, "dp": self.data, "cp": self.cp, "tp": self.tp}
        experts = {**stages, "edp_replicate": self.edp_replicate, "edp_shard": self.edp_shard}
        experts |= {"ep": self.ep, "etp": self.etp}
        return {
            "pp": _groups(attention, ["pp"]),
            "dp_replicate": _groups(attention, ["dp_replicate"]),
            "dp_cp": _groups(attention, ["dp_cp"]),
            "cp": _groups(parts, ["cp"]),
            "tp": _groups(attention, ["tp"]),
            "sequence": _groups(parts, ["cp", "tp"]),
            "edp_replicate": _groups(experts, ["edp_replicate"]),
            "edp_shard": _groups(experts, ["edp_shard"]),
            "ep": _groups(experts, ["ep"]),
            "etp": _groups(experts, ["etp"]),
            "dispatch": _groups(experts, ["ep", "etp"]),
            "stage": _groups(attention, ["dp_replicate", "dp_cp", "tp"]),
        }

    def meshes(self, device_type: str) -> Meshes:
        """The process groups of this layout. Every rank must call it once, at the same point of the run."""
        from .meshes import make_meshes  # meshes need layouts, and load more of torch

        return make_meshes(self, device_type)


def _digits(number: int, sizes: Iterable[int]) -> list[int]:
    """A number in a positional system with these base sizes, the last the fastest."""
    digits = []
    for size in reversed(list(sizes)):
        number, digit = divmod(number, size)
        digits.append(digit)
    return digits[::-1]


def _groups(sizes: dict[str, int], varying: list[str]) -> list[list[int]]:
    """Ranks of a grid that agree in all coordinates but the varying ones, in ascending order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(sizes.values())):
        at = dict(zip(sizes, _digits(rank, sizes.values())))
        groups.setdefault(tuple(at[name] for name in sizes if name not in varying), []).append(rank)
    return list(groups.values())


def _product(sizes: dict[str, int], keep: tuple[str, ...] = ()) -> tuple[str, bool]:
    """`layout.a=2 x layout.b=3 = 6` of the sizes above 1, and whether they are several."""
    shown = {name: size for name, size in sizes.items() if size > 1 or name in keep}
    factors = " x ".join(f"layout.{name}={size}" for name, size in shown.items())
    return (f"{factors} = {math.prod(shown.values())}" if len(shown) > 1 else factors), len(shown) > 1


def _ranks(world: int) -> str:
    return "1 rank" if world == 1 else f"{world} ranks"


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
