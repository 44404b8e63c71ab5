"""The process groups of a layout, made once and handed to whoever communicates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .layout import Coordinates, ResolvedLayout
from .torch_private import split_mesh

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Meshes:
    """This rank's place in a layout and the groups that it belongs to; `ResolvedLayout.meshes` makes it.

    A mesh or group over one rank is None, or a dimension of size 1 that nobody may communicate along. Experts may be
    cut and copied over other ranks than the remaining parameters (parallel folding).

    Attributes:
        layout: what it was made from.
        rank: of this process.
        coordinates: of this rank in both grids.
        dense: (dp_replicate, dp_cp), over which parameters outside of experts are copied and cut: cp ranks see parts of
            the same sequences, so for gradients each is one more data rank. None if both are 1.
        experts_data: (edp_replicate, edp_shard), the same for parameters of experts.
        experts: (ep, etp), over which the experts of a layer are spread and each of them is cut.
        tp, cp, pp: one dimension each.
        dispatch_group: the ranks of `experts`, rank ep * ETP + etp.
        sequence_group: the ranks that hold parts of the same sequences, rank cp * TP + tp.
        stage_group: the ranks that hold the same layers.
    """

    layout: ResolvedLayout = ResolvedLayout()
    rank: int = 0
    dense: DeviceMesh | None = None
    experts_data: DeviceMesh | None = None
    experts: DeviceMesh | None = None
    tp: DeviceMesh | None = None
    cp: DeviceMesh | None = None
    pp: DeviceMesh | None = None
    dispatch_group: dist.ProcessGroup | None = None
    sequence_group: dist.ProcessGroup | None = None
    stage_group: dist.ProcessGroup | None = None

    @property
    def coordinates(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this rank reads: all cp, tp and pp ranks of it read the same."""
        return self.layout.data_rank(self.rank)

    @property
    def data_world(self) -> int:
        return self.layout.data

    @property
    def is_last_stage(self) -> bool:
        return self.coordinates.pp == self.layout.pp - 1

    @property
    def is_data_main(self) -> bool:
        """True on one rank per share of the batch, on the last pipeline stage: the one that counts its tokens."""
        at = self.coordinates
        return self.is_last_stage and at.cp == 0 and at.tp == 0

    def gather_over_stages(self, value: T) -> list[T]:
        """What each rank of this pipeline passes, in the order of its stages. Every rank must call it."""
        if self.pp is None:
            return [value]
        values = [value] * self.layout.pp
        dist.all_gather_object(values, value, group=self.pp.get_group())
        return values

    def names_elsewhere(self, own: Iterable[str]) -> frozenset[str]:
        """Names that other pipeline stages have and this one has not. Every rank must call it."""
        here = list(own)
        return frozenset(name for stage in self.gather_over_stages(here) for name in stage) - frozenset(here)


ALONE = Meshes()


def make_meshes(layout: ResolvedLayout, device_type: str) -> Meshes:
    """Make and warm all process groups of a layout, in the same order on all ranks.

    A group that first communicates in the middle of a backward pass, while others do, can deadlock on GPUs.
    """
    if layout.world == 1:
        return ALONE
    world = init_device_mesh(device_type, (layout.world,), mesh_dim_names=("world",))

    def grid(*names: str, **sizes: int) -> DeviceMesh:
        """The ranks as a grid of these sizes, with groups along the named dimensions that have more than one rank."""
        return split_mesh(world, sizes, {name for name in names if sizes[name] > 1})

    data_cp = layout.dp_shard * layout.cp
    attention = grid(
        *("pp", "dp_replicate", "dp_cp", "tp"),
        pp=layout.pp,
        dp_replicate=layout.dp_replicate,
        dp_cp=data_cp,
        tp=layout.tp,
    )
    dense = attention["dp_replicate", "dp_cp"] if layout.dp_replicate * data_cp > 1 else None
    experts = experts_data = dispatch = None
    if layout.is_folded:
        folded = grid(
            *("edp_replicate", "edp_shard", "ep", "etp"),
            pp=layout.pp,
            edp_replicate=layout.edp_replicate,
            edp_shard=layout.edp_shard,
            ep=layout.ep,
            etp=layout.etp,
        )
        experts_data = folded["edp_replicate", "edp_shard"] if layout.edp > 1 else None
        experts = folded["ep", "etp"] if layout.ep * layout.etp > 1 else None
    else:
        experts_data = dense  # the very same ranks
    if layout.ep > 1 and layout.etp > 1:
        dispatch = grid("ep_etp", rest=layout.world // (layout.ep * layout.etp), ep_etp=layout.ep * layout.etp)
        dispatch = dispatch.get_group("ep_etp")
    elif experts is not None:
        dispatch = experts.get_group("ep" if layout.ep > 1 else "etp")
    tp = attention["tp"] if layout.tp > 1 else None
    cp = sequence = None
    if layout.cp > 1:
        cp = grid("cp", rest=layout.world // (layout.cp * layout.tp), cp=layout.cp, tp=layout.tp)["cp"]
    if layout.cp > 1 and layout.tp > 1:
        width = layout.cp * layout.tp
        sequence = grid("cp_tp", rest=layout.world // width, cp_tp=width).get_group("cp_tp")
    elif cp is not None or tp is not None:
        sequence = (cp or tp).get_group()  # type: ignore[union-attr]
    stage = None
    if layout.stage > 1:
        stage = grid("stage", pp=layout.pp, stage=layout.stage).get_group("stage")
    made = Meshes(
        layout=layout,
        rank=dist.get_rank(),
        dense=dense,
        experts_data=experts_data,
        experts=experts,
        tp=tp,
        cp=cp,
        pp=attention["pp"] if layout.pp > 1 else None,
        dispatch_group=dispatch,
        sequence_group=sequence,
        stage_group=stage,
    )
    _warm(made, device_type)
    return made


def _warm(meshes: Meshes, device_type: str) -> None:
    token = torch.zeros(1, device=device_type)
    for mesh in (meshes.pp, meshes.dense, meshes.tp, meshes.cp, meshes.experts_data, meshes.experts):
        if mesh is not None:
            for dim in range(mesh.ndim):
                if mesh.size(dim) > 1:
                    dist.all_reduce(token, group=mesh.get_group(dim))
    for group in (meshes.dispatch_group, meshes.sequence_group, meshes.stage_group):
        if group is not None:
            dist.all_reduce(token, group=group)
