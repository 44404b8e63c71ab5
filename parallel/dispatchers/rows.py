"""Gathering rows for a message and summing the rows of a token: index tables both ways, so no atomics.

The tables are kept by reference and not through saved tensors: a layer that is recomputed in the backward pass then
stops after its experts, and the way back of the sums is not repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ...kernels.grouped_mm import sum_by_token
from .tables import ReturnTable


def spread(x: Tensor, table: ReturnTable) -> Tensor:
    """The row of its token for each row that is sent: (T, D) -> (R, D). Backward sums the rows of a token."""
    return _Spread.apply(x, table)


def collect(rows: Tensor, table: ReturnTable) -> Tensor:
    """Sum the rows of each token in the order of the ranks, in float32 at least: (R, D) -> (T, D)."""
    return _Collect.apply(rows, table)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values[index], zero where the index is N: (N,) -> the shape of `index`, which names no other entry twice."""
    return _Pick.apply(values, index)


def total(rows: Tensor, table: ReturnTable) -> Tensor:
    """`collect` without a graph."""
    return sum_by_token(rows, None, table.rows, table.offsets)


def _rows_of(x: Tensor, table: ReturnTable) -> Tensor:
    if table.span > x.shape[0]:
        x = pad(x, (0, 0, 0, table.span - x.shape[0]))
    return x.index_select(0, table.token)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, table: ReturnTable) -> Tensor:
        ctx.table = table
        return _rows_of(x, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return total(grad, ctx.table), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, table: ReturnTable) -> Tensor:
        ctx.table = table
        return total(rows, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _rows_of(grad, ctx.table), None


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.count = index, values.numel()
        return pad(values, (0, 1))[index]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad.new_zeros(ctx.count + 1).index_copy_(0, ctx.index, grad)[:-1], None
