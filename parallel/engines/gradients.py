"""Sums and norms of gradients over ranks of which each may hold the whole, a part, or an empty part of a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..meshes import Meshes
from ..process import sum_over_ranks
from ..shards import local_part, parts

Groups = tuple[dist.ProcessGroup, ...]


class GradientSums:
    """Adds up gradients of which each rank has a part, in a few flat messages after the last backward pass.

    Args:
        groups: for each parameter, the groups to sum over one after the other.
        bucket_bytes: size of one message.
    """

    def __init__(self, groups: Mapping[nn.Parameter, Groups], bucket_bytes: int) -> None:
        self._parameters: dict[Groups, list[nn.Parameter]] = {}
        for parameter, over in groups.items():
            if over:
                self._parameters.setdefault(over, []).append(parameter)
        self._bucket_bytes = bucket_bytes

    @torch.no_grad()
    def __call__(self) -> None:
        """Sum. A parameter has a gradient on every rank of a group or on none."""
        for groups, parameters in self._parameters.items():
            gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
            for bucket in _buckets(gradients, self._bucket_bytes):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                for group in groups:
                    dist.all_reduce(flat, group=group)
                summed = flat.split([gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, summed):
                    gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Tensors of one type in lists of up to `limit` bytes, in order; a larger one is alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > limit or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float | None, meshes: Meshes, device: torch.device
) -> Tensor:
    """Scale gradients in place so that their global norm is at most `max_norm`.

    Every element of the model counts once: of a gradient that is cut into n parts, each part is on 1/n of the ranks
    of its pipeline stage, so each rank divides its squares by that number of copies, and one sum over all ranks gives
    the whole. Sums are taken in float64 and nothing waits for the device.

    Returns: () float32 global norm before scaling, the same on every rank.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_copies.setdefault(meshes.layout.stage // parts(parameter), []).append(local_part(parameter.grad))
    return clip_copies(by_copies, max_norm, device)


@torch.no_grad()
def clip_copies(by_copies: Mapping[int, Sequence[Tensor]], max_norm: float | None, device: torch.device) -> Tensor:
    """`clip_gradients` of what this rank holds of gradients, by on how many ranks the same elements are."""
    square = torch.zeros((), dtype=torch.float64, device=device)
    for copies, gradients in by_copies.items():
        square += get_total_norm(gradients).to(device).double().square() / copies
    norm = sum_over_ranks(square).sqrt().float()
    if max_norm is not None:
        factor = clip_factor(norm, max_norm)
        for gradients in by_copies.values():
            torch._foreach_mul_(gradients, factor)  # type: ignore[reportPrivateImportUsage]
    return norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """() by which gradients of this norm are scaled: at most 1.

    A norm that is not finite would spoil every gradient; left alone, they show where it came from.
    """
    return torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)


@torch.no_grad()
def gradient_norms(parts_of_model: Sequence[nn.Module], meshes: Meshes, device: torch.device) -> dict[str, float]:
    """Norm of each whole gradient by name, in the order of the forward pass; every rank gets those of all stages."""
    own: list[dict[str, float]] = []
    for part in parts_of_model:
        found = {name: p for name, p in part.named_parameters() if p.grad is not None}
        squares = torch.zeros(len(found), dtype=torch.float64, device=device)
        for row, parameter in enumerate(found.values()):
            gradient = local_part(parameter.grad)  # type: ignore[arg-type]
            copies = meshes.layout.stage // parts(parameter)
            squares[row] = torch.linalg.vector_norm(gradient, dtype=torch.float64).square() / copies
        if meshes.stage_group is not None:
            dist.all_reduce(squares, group=meshes.stage_group)
        own.append(dict(zip(found, squares.sqrt().tolist())))
    return gather_norms(own, meshes)


def gather_norms(own: list[dict[str, float]], meshes: Meshes) -> dict[str, float]:
    """Norms by name of all pipeline stages, in the order of the forward pass, from those of each part of this rank."""
    stages = meshes.gather_over_stages(own)
    return {name: norm for part in zip(*stages) for stage in part for name, norm in stage.items()}
