"""Gradient norms over parameters of which a rank may hold the whole, a shard, or an empty shard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None, device: torch.device) -> Tensor:
    """Scale gradients in place so that their global norm is at most `max_norm`.

    Gradients are grouped by how they are sharded: the squares of a group are summed over the ranks that share it, and
    over no others, so a replicated gradient counts once. Sums are taken in float64 and nothing waits for the device.

    Returns: () float32 global norm before scaling, the same on every rank.
    """
    groups = _by_sharding(parameter.grad for parameter in parameters if parameter.grad is not None)
    square = torch.zeros((), dtype=torch.float64, device=device)
    for (mesh, sharded_dims), gradients in groups.items():
        square += _sum_over(get_total_norm(gradients).to(device).double().square(), mesh, sharded_dims)
    norm = square.sqrt().float()
    if max_norm is not None:
        # A norm that is not finite would spoil every gradient; left alone, they show where it came from.
        factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
        for gradients in groups.values():
            torch._foreach_mul_(gradients, factor)  # type: ignore[reportPrivateImportUsage]
    return norm


def gradient_norms(parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Norm of each whole gradient by name, in the order given; one reduction per way of sharding."""
    names: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[str]] = {}
    squares: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            local, sharding = _local(parameter.grad)
            names.setdefault(sharding, []).append(name)
            squares.setdefault(sharding, []).append(torch.linalg.vector_norm(local, dtype=torch.float64).square())
    found: dict[str, float] = {}
    for (mesh, sharded_dims), values in squares.items():
        total = _sum_over(torch.stack(values), mesh, sharded_dims)
        found.update(zip(names[mesh, sharded_dims], total.sqrt().tolist()))
    return {name: found[name] for name in parameters if name in found}


def _by_sharding(gradients: Iterable[Tensor]) -> dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]]:
    groups: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for gradient in gradients:
        local, sharding = _local(gradient)
        groups.setdefault(sharding, []).append(local)
    return groups


def _local(gradient: Tensor) -> tuple[Tensor, tuple[DeviceMesh | None, tuple[int, ...]]]:
    """This rank's part of a gradient, and over which dimensions of which mesh the whole is cut."""
    if not isinstance(gradient, DTensor):
        return gradient, (None, ())
    dims = tuple(dim for dim, placement in enumerate(gradient.placements) if placement.is_shard())
    return gradient.to_local(), (gradient.device_mesh, dims)


def _sum_over(values: Tensor, mesh: DeviceMesh | None, dims: tuple[int, ...]) -> Tensor:
    for dim in dims:
        assert mesh is not None
        dist.all_reduce(values, group=mesh.get_group(dim))
    return values
