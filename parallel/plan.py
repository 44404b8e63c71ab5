"""What a model says about itself, so that an engine can spread it over ranks without knowing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from .meshes import Meshes


@dataclass(frozen=True, eq=False)
class StackedExperts:
    """A module whose parameters are stacked over the experts of a layer, in dimension 0.

    Attributes:
        module: it has no other parameters, and computes with the slices that this rank holds.
        cuts: by parameter name, the dimension over which expert tensor parallelism cuts; what is not named stays
            whole, and gets a part of its gradient on each etp rank.
    """

    module: nn.Module
    cuts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ShardingPlan:
    """The parts of a model, in the order of the forward pass.

    Attributes:
        units: submodules that are gathered, freed and compiled one at a time: the blocks.
        float32: submodules that compute in float32 also under bf16: the routers.
        experts: the stacked experts, each inside of a unit.
        tensor_styles: by module name, how tensor parallelism cuts it. The module takes and returns plain tensors.
    """

    units: Sequence[nn.Module] = ()
    float32: Sequence[nn.Module] = ()
    experts: Sequence[StackedExperts] = ()
    tensor_styles: Mapping[str, ParallelStyle] = field(default_factory=dict)


def cut_parameters(model: nn.Module, plan: ShardingPlan, meshes: Meshes) -> None:
    """Replace parameters by this rank's parts, over tp, and over ep and etp for experts.

    Works on the meta device, and on a model with values, which must be the same on every rank then.
    """
    if meshes.tp is not None and plan.tensor_styles:
        parallelize_module(model, meshes.tp, dict(plan.tensor_styles), src_data_rank=None)
    if meshes.experts is not None:
        for experts in plan.experts:
            cut_experts(experts, meshes.experts)


def cut_experts(experts: StackedExperts, mesh: DeviceMesh) -> None:
    """Spread the experts over ep and cut each over etp."""
    dims = tuple(name for dim, name in enumerate(mesh.mesh_dim_names or ()) if mesh.size(dim) > 1)
    for name, parameter in list(experts.module.named_parameters(recurse=False)):
        cut = experts.cuts.get(name)
        placements = {"ep": Shard(0), "etp": Replicate() if cut is None else Shard(cut % parameter.ndim)}
        part = distribute_tensor(parameter.data, mesh[dims], [placements[dim] for dim in dims], src_data_rank=None)
        experts.module.register_parameter(name, nn.Parameter(part, parameter.requires_grad))


def is_meta(model: nn.Module) -> bool:
    """Whether the model has no values yet."""
    return any(parameter.device == torch.device("meta") for parameter in model.parameters())
