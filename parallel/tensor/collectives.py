"""Tensor and sequence parallelism: collectives that gradients flow through, on plain tensors.

Between layers each tp rank holds a part of the sequence. A layer gathers the whole once, its first projections make a
slice of the channels on each rank, its last projection sums over the slices and leaves each rank its part of the
sequence: an all-gather and a reduce-scatter forward, the same backward (Korthikanti et al., 2205.05198, section 4.2.2).

Weights are DTensors over the tp mesh (`styles`), and layers compute with their local parts. Activations are never
DTensors, so that their shapes may change from pass to pass under torch.compile, which DTensors do not stand.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels.untraced import untraced
from ..torch_private import all_gather_single, reduce_scatter_single


def gather_sequence(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Whole sequences from the consecutive parts of all ranks: (B, S / TP, ...) -> (B, S, ...)."""
    if group is None:
        return part
    rows = part.shape[0]
    return gather_rows(part, group).unflatten(0, (-1, rows)).transpose(0, 1).flatten(1, 2)


def scatter_sequence(partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over ranks, of which each gets its part of the sequences: (B, S, ...) -> (B, S / TP, ...)."""
    if group is None:
        return partial
    return scatter_rows(sequence_parts(partial, group).flatten(0, 1), group)


def sequence_parts(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, S, ...) -> (TP, B, S / TP, ...), the parts that the ranks hold."""
    return whole.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1)


@untraced
def gather_rows(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' tensors one after the other along the first dimension: (N, ...) -> (ranks * N, ...).

    Each rank goes on to use the whole, so its gradient is a share: backward sums the shares and returns the own rows.
    """
    return part if group is None else _GatherRows.apply(part, group)


@untraced
def scatter_rows(partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over ranks, of which each gets its part of the rows: (ranks * N, ...) -> (N, ...). Backward gathers."""
    return partial if group is None else _ScatterRows.apply(partial, group)


@untraced
def sum_shares(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks, which every rank goes on to use in its own way: so backward sums the gradients over ranks."""
    return _SumShares.apply(share, group)


def all_gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`gather_rows` without a gradient."""
    out = part.new_empty(dist.get_world_size(group) * part.shape[0], *part.shape[1:])
    all_gather_single(out, part.contiguous(), group=group)
    return out


def _scatter(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = partial.new_empty(partial.shape[0] // dist.get_world_size(group), *partial.shape[1:])
    reduce_scatter_single(out, partial.contiguous(), group=group)
    return out


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(part, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _scatter(grad, ctx.group), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter(partial, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return all_gather(grad, ctx.group), None


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = share.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
