"""Megatron's process groups as the place in a layout that our dispatchers and routers know."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from ...kernels import ConfigError
from ...parallel.layout import ResolvedLayout
from ...parallel.meshes import Meshes

# tp_ep spans expert tensor and expert parallel ranks (index ep * ETP + etp), tp_cp the parts of one sequence
# (index cp * TP + tp): the orders of `Meshes.dispatch_group` and `sequence_group`.
NEEDED = ("tp", "cp", "pp", "dp", "tp_cp", "dp_cp", "ep", "expt_tp", "expt_dp", "tp_ep")


def groups_of_megatron() -> ProcessGroupCollection:
    """Those of `parallel_state`, which must be initialised."""
    return ProcessGroupCollection.use_mpu_process_groups(list(NEEDED))


def layout_of(groups: ProcessGroupCollection) -> ResolvedLayout:
    """The sizes of all groups."""
    return ResolvedLayout(
        dp_replicate=groups.dp.size(),
        cp=groups.cp.size(),
        tp=groups.tp.size(),
        pp=groups.pp.size(),
        ep=groups.ep.size(),
        etp=groups.expt_tp.size(),
    )


def meshes_of(groups: ProcessGroupCollection) -> Meshes:
    """This rank's place, with the two groups that a MoE layer communicates in.

    Raises: ConfigError if the ranks are in another order than tp-cp-ep-dp-pp, Megatron's usual one and ours.
    """
    layout, rank = layout_of(groups), dist.get_rank()
    at = layout.coordinates(rank)
    for name, ours in {"tp": at.tp, "cp": at.cp, "pp": at.pp, "ep": at.ep, "expt_tp": at.etp}.items():
        theirs = getattr(groups, name).rank()
        if theirs != ours:
            raise ConfigError(
                f"Megatron's order of ranks gives rank {rank} index {theirs} of {name}, allowed: tp-cp-ep-dp-pp"
            )
    return Meshes(
        layout=layout,
        rank=rank,
        dispatch_group=groups.tp_ep if layout.ep * layout.etp > 1 else None,
        sequence_group=groups.tp_cp if layout.cp * layout.tp > 1 else None,
    )
