"""`moe_mlp` by Triton kernels: the forward and the backward pass as sequences of launches.

At most one temporary of N x D exists at a time, nothing is read back to the host, nothing is added by atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..fused_operator import fused_operator, new_gradients
from . import launch
from .launch import Groups, rows_of


def forward_pass(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    token: Tensor,
    expert_offsets: Tensor,
    assignment: Tensor,
    token_offsets: Tensor,
    activation: str,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    """up with activation, down, sum by token. See `fused_operator`."""
    num_rows, num_tokens = token.numel(), token_offsets.numel() - 1
    z = x.new_empty(num_rows, w_in.shape[1]) if save_z else x.new_empty(0)
    if not num_rows or not num_tokens:
        return x.new_zeros(num_tokens, w_out.shape[1]), z
    x, w_in, w_out = rows_of(x), rows_of(w_in), rows_of(w_out)
    groups = Groups(expert_offsets, num_rows)
    with torch.cuda.device_of(x):
        a = x.new_empty(num_rows, w_out.shape[2])
        launch.up(x, token, w_in, b_in, z if save_z else None, a, groups, activation)
        y = x.new_empty(num_rows, w_out.shape[1])
        launch.rows(a, None, w_out, b_out, y, None, groups)
        del a
        out = x.new_empty(num_tokens, w_out.shape[1])
        launch.sum_by_token(y, weight, assignment, token_offsets, out)
    return out, z


def backward_pass(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    weight: Tensor,
    token: Tensor,
    expert_offsets: Tensor,
    assignment: Tensor,
    token_offsets: Tensor,
    z: Tensor,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    """Activation gradient, both weight gradients, rows of dx, sum by token. See `fused_operator`."""
    need_x, need_in, need_out, need_b_in, need_b_out, need_weight = needs
    num_rows, num_tokens = token.numel(), token_offsets.numel() - 1
    if not num_rows or not num_tokens:
        return new_gradients((x, w_in, w_out, b_in, b_out, weight), needs, torch.zeros_like)
    grads = dx, dw_in, dw_out, db_in, db_out, dweight = new_gradients((x, w_in, w_out, b_in, b_out, weight), needs)
    grad, x, w_in, w_out = grad.contiguous(), rows_of(x), rows_of(w_in), rows_of(w_out)
    groups = Groups(expert_offsets, num_rows)
    with torch.cuda.device_of(x):
        if not z.numel():
            z = x.new_empty(num_rows, w_in.shape[1])
            launch.up(x, token, w_in, b_in, z, None, groups, activation)
        dz, weighted = torch.empty_like(z), x.new_empty(num_rows, w_out.shape[2])
        partial = launch.dact(grad, token, w_out, z, weight, dz, weighted, groups, activation)
        del z
        if need_weight:
            launch.weight_from_partials(partial, grad, token, b_out, dweight, groups)
        if need_out:
            launch.weight_gradient(grad, token, weighted, None, dw_out, groups)
        del partial, weighted
        if need_b_out:
            launch.bias_gradient(grad, token, weight, db_out, groups)
        if need_in:
            launch.weight_gradient(dz, None, x, token, dw_in, groups)
        if need_b_in:
            launch.bias_gradient(dz, None, None, db_in, groups)
        if need_x:
            rows = x.new_empty(num_rows, x.shape[1])
            launch.rows(dz, None, w_in, None, rows, None, groups, k_rows=True)
            del dz
            launch.sum_by_token(rows, None, assignment, token_offsets, dx)
    return grads


moe_mlp_triton = fused_operator("moe_mlp_triton", forward_pass, backward_pass)
