"""`moe_mlp` as two custom operators, forward and backward, with fake implementations and a registered gradient.

Saved for backward: x, the pre-activation z (N, 2F) and the routing tables; with recompute="all" only x and the tables.
At most one temporary of N x D exists at a time. Nothing is read back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import GATED
from ..routing import Routing
from . import launch
from .launch import Groups, rows_of


def moe_mlp_triton(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    activation: str,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    recompute: str = "none",
) -> Tensor:
    """Same value and gradients as `moe_mlp_reference`, by fused Triton kernels.

    Shapes: x (T, D), w_in (E, 2F or F, D), w_out (E, D, F), b_in (E, 2F or F), b_out (E, D) -> (T, D), all of one
        dtype: float32, bfloat16 or float16. routing.weight may be of any of them.
    """
    inputs = (x, w_in, w_out, b_in, b_out, routing.weight)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    tables = (routing.token, routing.expert_offsets, routing.assignment, routing.token_offsets)
    out, _ = _forward(*inputs, *tables, activation, trained and recompute == "none")
    return out


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
    """The output (T, D), and the pre-activation (N, 2F or F), empty unless it is to be saved."""
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


_forward = torch.library.custom_op("scatterfold::moe_mlp", forward_pass, mutates_args=())


@_forward.register_fake
def _(x, w_in, w_out, b_in, b_out, weight, token, expert_offsets, assignment, token_offsets, activation, save_z):
    z = x.new_empty(token.shape[0], w_in.shape[1]) if save_z else x.new_empty(0)
    return x.new_empty(token_offsets.shape[0] - 1, w_out.shape[1]), z


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
    """Gradients of (x, w_in, w_out, b_in, b_out, weight); those not in `needs` are empty."""
    need_x, need_in, need_out, need_b_in, need_b_out, need_weight = needs
    num_rows, num_tokens = token.numel(), token_offsets.numel() - 1
    if not num_rows or not num_tokens:
        return _results((x, w_in, w_out, b_in, b_out, weight), needs, torch.zeros_like)
    out = _results((x, w_in, w_out, b_in, b_out, weight), needs, _new)
    dx, dw_in, dw_out, db_in, db_out, dweight = out
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
    return out


def _new(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _results(inputs, needs, make) -> list[Tensor]:
    empty = inputs[0]
    return [make(t) if need and t is not None else empty.new_empty(0) for t, need in zip(inputs, needs)]


_backward = torch.library.custom_op("scatterfold::moe_mlp_backward", backward_pass, mutates_args=())


@_backward.register_fake
def _(
    grad, x, w_in, w_out, b_in, b_out, weight, token, expert_offsets, assignment, token_offsets, z, activation, needs
):  # fmt: skip
    return _results((x, w_in, w_out, b_in, b_out, weight), needs, _new)


def _setup(ctx, inputs, output) -> None:
    *tensors, activation, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.activation = activation
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, _):
    if grad is None:
        return (None,) * 12
    needs = list(ctx.needs_input_grad[:6])
    grads = _backward(grad, *ctx.saved_tensors, ctx.activation, needs)
    return (*(g if need else None for g, need in zip(grads, needs)), *(None,) * 6)


_forward.register_autograd(_gradient, setup_context=_setup)
