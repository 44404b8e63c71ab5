"""FSDP2 over two meshes: experts over theirs, everything else over the dense one, and what neither of them cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..meshes import Meshes
from ..plan import ShardingPlan
from ..shards import cut_dimensions
from .gradients import Groups


@dataclass(frozen=True)
class Places:
    """Names of parameters of one part by who takes care of them.

    Attributes:
        experts: cut over ep or etp, or copied over other ranks than the rest: parameters of folded experts.
        whole: not managed by FSDP; sums of their gradients are the engine's.
    """

    experts: frozenset[str]
    whole: frozenset[str]


def places(part: nn.Module, plan: ShardingPlan, meshes: Meshes, precision: str) -> Places:
    """Decide who manages each parameter of a part, before it is sharded.

    Whole stay: everything where nothing is to be cut; under bf16, what must not travel rounded; with tp, parameters
    that all tp ranks share, for their gradients must be summed over tp as well; and what does not divide.
    """
    stacked = plan.experts if meshes.layout.is_folded else ()
    expert_ids = {id(parameter) for experts in stacked for parameter in experts.module.parameters()}
    exact = _float32_ids(plan) if precision == "bf16" else set()
    experts, whole = set(), set()
    for name, parameter in part.named_parameters():
        if id(parameter) in expert_ids:
            experts.add(name)
            ways = meshes.layout.edp_shard
        else:
            ways = meshes.layout.dp_shard * meshes.layout.cp if meshes.layout.dp_shard > 1 else 1
        is_shared = meshes.tp is not None and not isinstance(parameter, DTensor)
        must_stay = id(parameter) in exact or (is_shared and name not in experts)
        if ways == 1 or must_stay or shard_dimension(parameter, ways) is None:
            whole.add(name)
    return Places(frozenset(experts), frozenset(whole))


def shard_dimension(parameter: nn.Parameter, ways: int) -> int | None:
    """The dimension that FSDP cuts in `ways` parts: 0, or the first that divides; None if there is none.

    FSDP may cut dimension 0 into unequal parts, but not where tensor or expert parallelism has cut it before: torch
    cannot name the indices of such a part.
    """
    cut = {dim: 1 for dim in range(parameter.ndim)}
    for at in cut_dimensions(parameter):
        cut[parameter.placements[at].dim % parameter.ndim] *= parameter.device_mesh.size(at)  # type: ignore[union-attr]
    if cut.get(0, 1) == 1:
        return 0
    return next((dim for dim, size in enumerate(parameter.shape) if size % (cut[dim] * ways) == 0), None)


def shard(
    part: nn.Module, plan: ShardingPlan, meshes: Meshes, at: Places, precision: str, reshard_after_forward: bool
) -> None:
    """Let FSDP2 manage what is not whole: one unit per block, one within it for its experts, and the rest."""
    inside = {id(module) for module in part.modules()}
    named = dict(part.named_parameters())
    ignored = {named[name] for name in at.whole}
    cast = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    of_experts = _submesh(meshes.experts_data)
    dense = _submesh(meshes.dense)

    def place(ways: int):
        return lambda parameter: Shard(shard_dimension(parameter, ways) or 0)

    if any(name not in at.whole for name in at.experts):
        for stacked in plan.experts:
            if id(stacked.module) in inside:
                fully_shard(
                    stacked.module,
                    mesh=of_experts,
                    mp_policy=policy,
                    reshard_after_forward=reshard_after_forward,
                    shard_placement_fn=place(meshes.layout.edp_shard),
                    ignored_params=ignored,
                )
    dense_place = place(meshes.layout.dp_shard * meshes.layout.cp)
    for unit in plan.units:
        if id(unit) in inside:
            fully_shard(
                unit,
                mesh=dense,
                mp_policy=policy,
                reshard_after_forward=reshard_after_forward,
                shard_placement_fn=dense_place,
                ignored_params=ignored,
            )
    outside = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(part, mesh=dense, mp_policy=outside, shard_placement_fn=dense_place, ignored_params=ignored)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            # Both are needed for a plain sum: with a factor alone torch asks for PREMUL_SUM, which gloo lacks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _set_prefetch(part, [unit for unit in plan.units if id(unit) in inside])


def _set_prefetch(part: nn.Module, units: Sequence[nn.Module]) -> None:
    """Gather each block, and its experts, while the one before it computes, in both directions.

    By itself FSDP learns the order as it goes, and the host's wait for the token counts of a dispatch would come
    before the next gather is asked for.
    """
    stops = [[module for module in unit.modules() if isinstance(module, FSDPModule)] for unit in units]
    chain = [part, *units]
    for before, coming in zip(chain, stops):
        before.set_modules_to_forward_prefetch(coming)  # type: ignore[operator]
    for after, coming in zip([part, *units[::-1]], stops[::-1]):
        after.set_modules_to_backward_prefetch(coming)  # type: ignore[operator]


def gradient_groups(part: nn.Module, meshes: Meshes, at: Places) -> dict[nn.Parameter, Groups]:
    """The groups over which the gradient of each parameter must be summed besides what FSDP does."""
    stage: Groups = () if meshes.stage_group is None else (meshes.stage_group,)
    dense, of_experts = _groups(meshes.dense), _groups(meshes.experts_data)
    etp: Groups = ()
    if meshes.experts is not None and meshes.layout.etp > 1:
        etp = (meshes.experts.get_group("etp"),)
    found: dict[nn.Parameter, Groups] = {}
    for name, parameter in part.named_parameters():
        if name in at.experts:
            summed = of_experts if name in at.whole else ()
            found[parameter] = summed + (etp if _is_copied(parameter, "etp") else ())
        elif name in at.whole:
            found[parameter] = dense if isinstance(parameter, DTensor) else stage
    return found


def _is_copied(parameter: nn.Parameter, dim: str) -> bool:
    """Whether all ranks along a mesh dimension hold the same of a parameter."""
    if not isinstance(parameter, DTensor) or dim not in (parameter.device_mesh.mesh_dim_names or ()):
        return True
    return isinstance(parameter.placements[parameter.device_mesh.mesh_dim_names.index(dim)], Replicate)  # type: ignore[union-attr]


def _submesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """A (copies, shards) mesh without the dimension of copies if there is only one."""
    return mesh if mesh is None or mesh.size(0) > 1 else mesh[mesh.mesh_dim_names[1]]  # type: ignore[index]


def _groups(mesh: DeviceMesh | None) -> Groups:
    return () if mesh is None else tuple(mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1)


def _float32_ids(plan: ShardingPlan) -> set[int]:
    """Parameters of units that bfloat16 must not round: vectors, and all of the modules that compute in float32."""
    inside = [parameter for unit in plan.units for parameter in unit.parameters()]
    chosen = {id(parameter) for module in plan.float32 for parameter in module.parameters()}
    return {id(parameter) for parameter in inside if parameter.ndim < 2 or id(parameter) in chosen}
