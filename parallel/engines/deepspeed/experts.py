"""Expert parameters as DeepSpeed expects them: plain tensors of this rank's experts, marked, in groups of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ...meshes import Meshes


@dataclass(frozen=True)
class Cut:
    """How what DeepSpeed sees as a plain tensor is part of a whole one."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def whole(self, local: Tensor) -> DTensor:
        """The distributed tensor of which this rank holds `local`."""
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


def localise(part: nn.Module) -> dict[str, Cut]:
    """Replace distributed parameters by plain ones, this rank's parts; by name, what they are parts of."""
    cuts: dict[str, Cut] = {}
    for prefix, module in part.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                cut = Cut(parameter.device_mesh, tuple(parameter.placements), parameter.shape, parameter.stride())
                cuts[f"{prefix}.{name}" if prefix else name] = cut
                local = nn.Parameter(parameter.data.to_local(), parameter.requires_grad)  # type: ignore[attr-defined]
                module.register_parameter(name, local)
    return cuts


def mark_experts(part: nn.Module, cuts: Mapping[str, Cut], meshes: Meshes) -> None:
    """Tell DeepSpeed which parameters are experts', and which ranks have copies of the same ones.

    It reads two attributes of a parameter (`allreduce`, `group_name`) and looks the name up among its groups, which
    would be its own if its own MoE layer had made them; these are ours. Every rank must call it.
    """
    from deepspeed.utils import groups

    layout = meshes.layout
    name = f"ep_size_{layout.ep}"  # it reads the size out of the name
    for full, parameter in part.named_parameters():
        if full in cuts:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = name  # type: ignore[attr-defined]
    ranks = {kind: next(own for own in of_kind if meshes.rank in own) for kind, of_kind in layout.groups().items()}
    assert meshes.experts is not None
    groups._EXPERT_PARALLEL_GROUP[name] = meshes.experts.get_group("ep")
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = ranks["ep"]
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = _copies_group(meshes)
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = ranks["edp_replicate"]


def _copies_group(meshes: Meshes) -> dist.ProcessGroup:
    """The ranks with copies of this rank's experts. A group of one too, which every rank must make for all."""
    if meshes.experts_data is not None:
        return meshes.experts_data.get_group("edp_replicate")
    alone = [dist.new_group([rank]) for rank in range(meshes.layout.world)]
    return alone[meshes.rank]  # type: ignore[return-value]


def is_expert(parameter: Tensor) -> bool:
    return not getattr(parameter, "allreduce", True)


def split_groups(optimizer: torch.optim.Optimizer) -> None:
    """Give experts parameter groups of their own, marked and of a size that DeepSpeed takes."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    if not any(is_expert(p) for group in optimizer.param_groups for p in group["params"]):
        return
    for number, group in enumerate(optimizer.param_groups):
        group["name"] = f"dense {number}"  # it sorts by name, and gives the groups of experts that of theirs
    optimizer.param_groups[:] = [group for group in split(optimizer.param_groups) if group["params"]]
