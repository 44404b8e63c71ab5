"""`scatter2scatter`: a linear layer per expert that gathers its input rows and scatters its output rows.

The ParallelLinear of ScatterMoE (Tan et al. 2024, section 3), for a variable number of experts per token. Mixture of
Attention heads and LoRA experts are built from it; `moe_mlp` is the fused form for two of them with an activation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .errors import ConfigError
from .grouped_mm import check, grouped_rows, sum_by_token
from .routing import Routing

Side = Literal["token", "slot", "expert"]
SIDES = ("token", "slot", "expert")


def scatter2scatter(
    x: Tensor,
    w: Tensor,
    routing: Routing,
    x_side: Side = "token",
    y_side: Side = "expert",
    bias: Tensor | None = None,
) -> Tensor:
    """Apply each assignment's expert, w[e] @ x + bias[e], with either side in any of three orders.

    A side is ordered by
        "token": one row per token, (T, .). As input, a token's row serves all its experts. As output, it is the sum of
            their results by the combine weights, and routing.weight gets a gradient;
        "slot": one row per assignment, token after token, a token's experts ascending, (N, .);
        "expert": one row per assignment, expert after expert, as `Routing.token` lists them, (N, .).
    Differentiable in x, w, bias and routing.weight. Padding rows are not read; their result is zero.

    Args:
        x: (T, D) or (N, D).
        w: (E, O, D), of the dtype of x; a transposed view of (E, D, O) serves as well.
        routing: over T tokens and E experts.
        bias: (E, O) or None.

    Returns: (T, O) or (N, O).
    Raises: ConfigError for an unknown side, or shapes or dtypes that do not fit.
    """
    _check(x, w, routing, x_side, y_side)
    x_index = {"token": routing.token, "slot": None, "expert": None}[x_side]
    y_index = None
    if "slot" in (x_side, y_side):
        slot = slot_of_assignment(routing)
        x_index = slot if x_side == "slot" else x_index
        y_index = slot if y_side == "slot" else None
    by_token = (routing.assignment, routing.token_offsets) if x_side == "token" else (None, None)
    y = grouped_rows(x, w, bias, x_index, y_index, routing.expert_offsets, *by_token)
    return weighted_sum(y, routing) if y_side == "token" else y


def weighted_sum(y: Tensor, routing: Routing) -> Tensor:
    """Sum of rows ordered by expert, (N, O), per token and by the combine weights: (T, O).

    Differentiable in y and routing.weight. Padding rows are not read.
    """
    return _WeightedSum.apply(
        y, routing.weight, routing.token, routing.expert_offsets, routing.assignment, routing.token_offsets
    )  # pyright: ignore[reportReturnType]


def slot_of_assignment(routing: Routing) -> Tensor:
    """(N,) int32, the place of each assignment in the order by token; unspecified for padding."""
    count = routing.assignment.numel()
    place = torch.arange(count, dtype=torch.int32, device=routing.assignment.device)
    target = torch.where(place < routing.token_offsets[-1], routing.assignment, count).long()
    return place.new_zeros(count + 1).index_copy_(0, target, place)[:count]


class _WeightedSum(torch.autograd.Function):
    """Sum of y (N, O), ordered by expert, per token and by the combine weights."""

    @staticmethod
    def forward(ctx, y, weight, token, expert_offsets, assignment, token_offsets):
        ctx.save_for_backward(y, weight, token, expert_offsets)
        return sum_by_token(y, weight, assignment, token_offsets)

    @staticmethod
    def backward(ctx, grad):
        y, weight, token, expert_offsets = ctx.saved_tensors
        counts = torch.arange(token.numel(), device=token.device) < expert_offsets[-1]
        rows = grad.index_select(0, torch.where(counts, token, 0))
        grad_y = grad_weight = None
        if ctx.needs_input_grad[1]:
            inner = torch.linalg.vecdot(rows.to(weight.dtype), y.to(weight.dtype))
            grad_weight = torch.where(counts, inner, 0)
        if ctx.needs_input_grad[0]:
            grad_y = rows.mul_(torch.where(counts, weight, 0)[:, None])
        return grad_y, grad_weight, None, None, None, None


def _check(x: Tensor, w: Tensor, routing: Routing, x_side: str, y_side: str) -> None:
    for name, side in (("x_side", x_side), ("y_side", y_side)):
        if side not in SIDES:
            raise ConfigError(f"{name}={side!r} is unknown, allowed: {', '.join(SIDES)}")
    check(x, w, routing.expert_offsets)
    rows = routing.num_tokens if x_side == "token" else routing.token.numel()
    if x.shape[0] != rows:
        raise ConfigError(f"x has {x.shape[0]} rows, x_side={x_side!r} of this routing needs {rows}")
