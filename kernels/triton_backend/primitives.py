"""The grouped operators of grouped_mm.py by Triton kernels: allocate the result, launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import combine as kernels
from . import launch
from .launch import Groups, rows_of


def rows_forward(
    x: Tensor,
    w: Tensor,
    transposed: bool,
    bias: Tensor | None,
    x_index: Tensor | None,
    y_index: Tensor | None,
    offsets: Tensor,
    num_rows: int,
) -> Tensor:
    """`grouped_rows`; w (E, O, D), or (E, D, O) if transposed."""
    x, w = rows_of(x), rows_of(w)
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(num_rows, w.shape[2] if transposed else w.shape[1])
    with torch.cuda.device_of(x):
        launch.rows(x, x_index, w, bias, y, y_index, Groups(offsets, num_rows), k_rows=transposed)
        _zero_padding(y, offsets)
    return y


def weight_grad(grad: Tensor, x: Tensor, y_index: Tensor | None, x_index: Tensor | None, offsets: Tensor) -> Tensor:
    """`grouped_weight_grad`."""
    grad, x = rows_of(grad), rows_of(x)
    out = x.new_empty(offsets.numel() - 1, grad.shape[1], x.shape[1])
    with torch.cuda.device_of(x):
        launch.weight_gradient(grad, y_index, x, x_index, out, Groups(offsets, grad.shape[0]))
    return out


def bias_grad(grad: Tensor, y_index: Tensor | None, offsets: Tensor) -> Tensor:
    """`grouped_bias_grad`."""
    grad = rows_of(grad)
    out = grad.new_empty(offsets.numel() - 1, grad.shape[1])
    with torch.cuda.device_of(grad):
        launch.bias_gradient(grad, y_index, None, out, Groups(offsets, grad.shape[0]))
    return out


def combine(y: Tensor, weight: Tensor | None, assignment: Tensor, token_offsets: Tensor) -> Tensor:
    """`sum_by_token`."""
    y = rows_of(y)
    out = y.new_empty(token_offsets.numel() - 1, y.shape[1])
    with torch.cuda.device_of(y):
        launch.sum_by_token(y, weight, assignment, token_offsets, out)
    return out


def _zero_padding(y: Tensor, offsets: Tensor) -> None:
    block_d = min(1024, triton.next_power_of_2(y.shape[1]))
    launch.launch(
        kernels.zero_padding_kernel,
        (triton.cdiv(y.shape[0], 16),),
        y=y,
        offsets=offsets,
        num_experts=offsets.numel() - 1,
        num_rows=y.shape[0],
        D=y.shape[1],
        ROWS=16,
        BLOCK_D=block_d,
    )
