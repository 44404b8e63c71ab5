"""The fast CPU path: one GEMM per expert on sorted rows, forward and backward in one autograd function.

Saved for backward: x, the pre-activation h (N, 2F) and the routing tables; nothing of size N x D. The rows of one
expert are gathered into buffers that the next expert uses again, so they stay in cache and cost no page faults.
Outputs of all experts are summed per token by the inverse table: no atomics, no order of experts, float32 sums. The
gradient of a combine weight is the inner product of the activation and its un-weighted gradient, so neither expert
outputs nor their gradients are kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from .activations import activate_backward_out, activate_out
from .routing import Routing
from .untraced import untraced


@untraced  # loads of experts are Python numbers here: a trace would be made anew for each batch
def moe_mlp_cpu(x: Tensor, w_in: Tensor, w_out: Tensor, routing: Routing, activation: str) -> Tensor:
    """Same value and gradients as `moe_mlp_reference`, faster and with less memory. Runs on any device.

    Rows that no expert takes are zero. Sums over experts accumulate in float32 for half-precision inputs.

    Shapes: x (T, D), w_in (E, 2F or F, D), w_out (E, D, F) -> (T, D), all of one dtype; routing.weight any float.
    """
    tables = routing.token, routing.assignment, routing.token_offsets, routing.expert_offsets
    return _ExpertLoop.apply(x, w_in, w_out, routing.weight, *tables, activation, torch.is_grad_enabled())


class _ExpertLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, w_out, weight, token, assignment, token_offsets, expert_offsets, activation, save):
        offsets = expert_offsets.tolist()  # the one host synchronisation
        total, longest = offsets[-1], _longest(offsets)
        h = x.new_empty(total if save else longest, w_in.shape[1])
        outputs = x.new_empty(total, x.shape[1])
        rows_buffer = x.new_empty(longest, x.shape[1])
        activation_buffer = x.new_empty(longest, w_out.shape[2])
        for expert, own in _non_empty(offsets):
            count = own.stop - own.start
            rows, a_e, h_e = rows_buffer[:count], activation_buffer[:count], h[own] if save else h[:count]
            torch.index_select(x, 0, token[own], out=rows)
            torch.mm(rows, w_in[expert].T, out=h_e)
            activate_out(activation, h_e, out=a_e, inner=a_e)
            torch.mm(a_e.mul_(weight[own, None]), w_out[expert].T, out=outputs[own])
        if save:
            ctx.save_for_backward(x, w_in, w_out, weight, token, assignment, token_offsets, h)
            ctx.offsets, ctx.activation = offsets, activation
        return _sum_per_token(outputs, assignment, token_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, w_in, w_out, weight, token, assignment, token_offsets, h = ctx.saved_tensors
        need_x, need_in, need_out, need_weight = ctx.needs_input_grad[:4]
        longest = _longest(ctx.offsets)
        grad_rows_x = x.new_empty(h.shape[0], x.shape[1]) if need_x else None
        grad_in = _empty_gradient(w_in, ctx.offsets) if need_in else None
        grad_out_weight = _empty_gradient(w_out, ctx.offsets) if need_out else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        rows_buffer = x.new_empty(longest, x.shape[1])
        a_buffer, grad_a_buffer = x.new_empty(2, longest, w_out.shape[2])
        grad_h_buffer = x.new_empty(longest, w_in.shape[1])
        for expert, own in _non_empty(ctx.offsets):
            count = own.stop - own.start
            rows, a_e, grad_a, grad_h = (b[:count] for b in (rows_buffer, a_buffer, grad_a_buffer, grad_h_buffer))
            gate_half, up_half = grad_h[:, : a_e.shape[1]], grad_h[:, -a_e.shape[1] :]  # one and the same if not gated
            torch.index_select(grad_out, 0, token[own], out=rows)
            torch.mm(rows, w_out[expert], out=grad_a)  # of the un-weighted activation
            activate_out(ctx.activation, h[own], out=a_e, inner=up_half)
            if grad_weight is not None:
                product = torch.mul(grad_a, a_e, out=gate_half)
                torch.sum(product, -1, dtype=weight.dtype, out=grad_weight[own])
            if grad_out_weight is not None:
                torch.mm(rows.T, a_e.mul_(weight[own, None]), out=grad_out_weight[expert])
            if grad_rows_x is None and grad_in is None:
                continue
            activate_backward_out(ctx.activation, h[own], grad_a.mul_(weight[own, None]), grad_h)
            if grad_in is not None:
                torch.mm(grad_h.T, torch.index_select(x, 0, token[own], out=rows), out=grad_in[expert])
            if grad_rows_x is not None:
                torch.mm(grad_h, w_in[expert], out=grad_rows_x[own])
        grad_x = None if grad_rows_x is None else _sum_per_token(grad_rows_x, assignment, token_offsets)
        return grad_x, grad_in, grad_out_weight, grad_weight, None, None, None, None, None, None


def _non_empty(offsets: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have assignments, and where those are."""
    for expert, (start, end) in enumerate(zip(offsets, offsets[1:])):
        if start < end:
            yield expert, slice(start, end)


def _longest(offsets: list[int]) -> int:
    return max(end - start for start, end in zip(offsets, offsets[1:]))


def _empty_gradient(weight: Tensor, offsets: list[int]) -> Tensor:
    """A buffer for the gradient of stacked weights, zero for the experts that no token took."""
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert, (start, end) in enumerate(zip(offsets, offsets[1:])):
        if start == end:
            grad[expert].zero_()
    return grad


def _sum_per_token(rows: Tensor, assignment: Tensor, token_offsets: Tensor) -> Tensor:
    """Sum the rows of each token in the order of its experts, in float32 for half precision: (N, D) -> (T, D)."""
    return embedding_bag(
        assignment[: rows.shape[0]], rows, token_offsets, mode="sum", include_last_offset=True
    )  # one row per bag; parallel over tokens, 10 to 40 times faster than index_add_
