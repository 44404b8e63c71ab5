"""Our MoE layer in Megatron's distributed checkpoints, under the keys and in the shapes of Megatron's own MoE layer.

So a checkpoint loads into any expert, tensor, data or pipeline parallel size, and `interop.megatron` reads it:
    router.weight, router.bias, router.expert_bias      whole
    experts.experts.linear_fc1.weight                   (E, 2F, D), gate first; bias (E, 2F); without a gate, (E, F, …)
    experts.experts.linear_fc2.weight                   (E, D, F); bias (E, D)
    shared_experts.linear_fc1.weight, linear_fc2.weight (2F, D), (D, F); gate_weight (1, D)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from ...kernels import is_gated

if TYPE_CHECKING:
    from .layer import MegatronMoELayer

Offsets = tuple[tuple[int, int, int], ...]
_SHARED = {
    "w_gate.weight": "linear_fc1.weight",
    "w_up.weight": "linear_fc1.weight",
    "w_out.weight": "linear_fc2.weight",
    "gate.weight": "gate_weight",
}


def sharded_moe(layer: MegatronMoELayer, prefix: str, offsets: Offsets) -> dict[str, Any]:
    """The sharded state dict of one layer.

    Args:
        prefix: of its names.
        offsets: of dimensions that come before its own: the layer, where all layers share their keys.
    """
    state = {}
    for name, tensor in layer.state_dict(prefix="", keep_vars=True).items():
        of, _, rest = name.partition(".")
        if of == "experts":
            state[prefix + name] = _experts(layer, prefix, rest, tensor, offsets)
        elif of == "shared":
            state[prefix + name] = _shared(layer, prefix, rest, tensor, offsets)
        else:
            groups = layer.groups
            replica = (0, groups.tp.rank(), groups.dp_cp.rank())
            state[prefix + name] = _part(prefix + name, tensor, offsets, (), replica)
    return state


def _experts(layer: MegatronMoELayer, prefix: str, name: str, tensor: Tensor, offsets: Offsets) -> Any:
    groups, first = layer.groups, len(offsets)
    ep = (first, groups.ep.rank(), groups.ep.size())
    etp, slices = groups.expt_tp.rank(), groups.expt_tp.size()
    matrix = "linear_fc1" if name.endswith("_in") else "linear_fc2"
    key = f"{prefix}experts.experts.{matrix}.{'weight' if name.startswith('w') else 'bias'}"
    replica = (0, 0, groups.expt_dp.rank())
    if name == "b_out":
        return _part(key, tensor, offsets, (ep,), (0, etp, groups.expt_dp.rank()))
    if name == "w_out":
        return _part(key, tensor, offsets, (ep, (first + 2, etp, slices)), replica)
    if not is_gated(layer.experts.activation):
        return _part(key, tensor, offsets, (ep, (first + 1, etp, slices)), replica)

    def halves(key: str, both: Tensor, replica: Any, _: Any) -> list[ShardedTensor]:
        """(E / EP, 2, F / ETP, …): gate and up have each their own place in the 2F rows."""
        places = [(first + 1, half * slices + etp, 2 * slices) for half in range(2)]
        return [_part(key, both[:, half], offsets, (ep, place), replica) for half, place in enumerate(places)]

    return ShardedTensorFactory(key, tensor, halves, _stack, replica)  # type: ignore[arg-type]


@torch.no_grad()
def _stack(halves: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(halves), 1)


def _shared(layer: MegatronMoELayer, prefix: str, name: str, tensor: Tensor, offsets: Offsets) -> ShardedTensor:
    groups, first = layer.groups, len(offsets)
    rank, parts = groups.tp.rank(), groups.tp.size()
    key = f"{prefix}shared_experts.{_SHARED[name]}"
    if name == "gate.weight":
        return _part(key, tensor, offsets, (), (0, rank, groups.dp_cp.rank()))
    if name == "w_out.weight":
        place = (first + 1, rank, parts)
    elif layer.shared is not None and layer.shared.w_gate is None:
        place = (first, rank, parts)
    else:
        place = (first, rank + (parts if name == "w_up.weight" else 0), 2 * parts)
    return _part(key, tensor, offsets, (place,), (0, 0, groups.dp_cp.rank()))


def _part(key: str, tensor: Tensor, before: Offsets, own: Offsets, replica: tuple[int, int, int]) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, tensor, *before, *own, replica_id=replica, prepend_axis_num=len(before))
