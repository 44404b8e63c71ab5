"""Expert parameters as DeepSpeed expects them: plain tensors of this rank's experts, marked, in groups of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...meshes import Meshes
from ...plan import ShardingPlan
from . import library


@dataclass(frozen=True)
class Cut:
    """How a parameter that DeepSpeed sees as a plain tensor is part of a whole one."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def whole(self, local: Tensor) -> DTensor:
        """The distributed tensor of which this rank holds `local`."""
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


def localise(part: nn.Module, plan: ShardingPlan) -> dict[str, Cut]:
    """Replace distributed parameters by this rank's plain tensors, and say by name what they are parts of."""
    cuts: dict[str, Cut] = {}
    for module_name, module in part.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                local = nn.Parameter(parameter.data.to_local(), parameter.requires_grad)
                module.register_parameter(name, local)
                full = f"{module_name}.{name}" if module_name else name
                cuts[full] = Cut(parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride())
    return cuts


def mark_experts(part: nn.Module, cuts: dict[str, Cut], meshes: Meshes) -> None:
    if not cuts:
        return
    layout = meshes.layout
    name = f"ep_size_{layout.ep}"
    for full, parameter in part.named_parameters():
        if full in cuts:
            parameter.allreduce = False
            parameter.group_name = name
    from deepspeed.utils import groups
    alone = library.single_rank_groups(layout.world)
    ranks = layout.groups()
    def of(kind):
        return next(group for group in ranks[kind] if meshes.rank in group)
    edp = alone[meshes.rank] if meshes.experts_data is None else meshes.experts_data.get_group("edp_replicate")
    groups._EXPERT_PARALLEL_GROUP[name] = meshes.experts.get_group("ep")
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = of("ep")
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = edp
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = of("edp_replicate")


def split_groups(optimizer: torch.optim.Optimizer) -> None:
    for group in list(optimizer.param_groups):
        experts = [p for p in group["params"] if not getattr(p, "allreduce", True)]
        if experts:
            group["params"] = [p for p in group["params"] if getattr(p, "allreduce", True)]
            rest = {k: v for k, v in group.items() if k != "params"}
            optimizer.add_param_group({**rest, "params": experts, "moe": True, "name": experts[0].group_name})
