"""`moe_mlp` by Triton kernels: the forward and the backward pass as sequences of launches.

At most one temporary of N x D exists at a time, nothing is read back to the host, nothing is added by atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..fused_operator import ExpertLayer, fused_operator
from . import launch
from .launch import Groups, rows_of


def forward_pass(layer: ExpertLayer, save_z: bool) -> tuple[Tensor, Tensor]:
    """up with activation, down, sum by token. See `fused_operator`."""
    token, num_rows, num_tokens = layer.token, layer.token.numel(), layer.num_tokens
    x, w_in, w_out = layer.x, layer.w_in, layer.w_out
    z = x.new_empty(num_rows, w_in.shape[1]) if save_z else x.new_empty(0)
    if not num_rows or not num_tokens:
        return x.new_zeros(num_tokens, w_out.shape[1]), z
    x, w_in, w_out = rows_of(x), rows_of(w_in), rows_of(w_out)
    groups = Groups(layer.expert_offsets, num_rows)
    with torch.cuda.device_of(x):
        a = x.new_empty(num_rows, w_out.shape[2])
        launch.up(x, token, w_in, layer.b_in, z if save_z else None, a, groups, layer.activation)
        y = x.new_empty(num_rows, w_out.shape[1])
        launch.rows(a, None, w_out, layer.b_out, y, None, groups)
        del a
        out = x.new_empty(num_tokens, w_out.shape[1])
        launch.sum_by_token(y, layer.weight, layer.assignment, layer.token_offsets, out)
    return out, z


def backward_pass(layer: ExpertLayer, grad: Tensor, z: Tensor, needs: list[bool]) -> list[Tensor]:
    """Activation gradient, both weight gradients, rows of dx, sum by token. See `fused_operator`."""
    need_x, need_in, need_out, need_b_in, need_b_out, need_weight = needs
    token, num_rows, activation = layer.token, layer.token.numel(), layer.activation
    if not num_rows or not layer.num_tokens:
        return layer.new_gradients(needs, torch.zeros_like)
    grads = dx, dw_in, dw_out, db_in, db_out, dweight = layer.new_gradients(needs)
    grad, x, w_in, w_out = grad.contiguous(), rows_of(layer.x), rows_of(layer.w_in), rows_of(layer.w_out)
    groups = Groups(layer.expert_offsets, num_rows)
    with torch.cuda.device_of(x):
        if not z.numel():
            z = x.new_empty(num_rows, w_in.shape[1])
            launch.up(x, token, w_in, layer.b_in, z, None, groups, activation)
        dz, weighted = torch.empty_like(z), x.new_empty(num_rows, w_out.shape[2])
        partial = launch.dact(grad, token, w_out, z, layer.weight, dz, weighted, groups, activation)
        del z
        if need_weight:
            launch.weight_from_partials(partial, grad, token, layer.b_out, dweight, groups)
        if need_out:
            launch.weight_gradient(grad, token, weighted, None, dw_out, groups)
        del partial, weighted
        if need_b_out:
            launch.bias_gradient(grad, token, layer.weight, db_out, groups)
        if need_in:
            launch.weight_gradient(dz, None, x, token, dw_in, groups)
        if need_b_in:
            launch.bias_gradient(dz, None, None, db_in, groups)
        if need_x:
            rows = x.new_empty(num_rows, x.shape[1])
            launch.rows(dz, None, w_in, None, rows, None, groups, k_rows=True)
            del dz
            launch.sum_by_token(rows, None, layer.assignment, layer.token_offsets, dx)
    return grads


moe_mlp_triton = fused_operator("moe_mlp_triton", forward_pass, backward_pass)
