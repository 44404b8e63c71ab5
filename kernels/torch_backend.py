"""`moe_mlp` by torch's own grouped GEMM: gather, `F.grouped_mm`, activation, `F.grouped_mm`, sum by token.

The fallback on GPUs without Triton kernels and the pipeline that they have to beat. Saved for backward: x, the
pre-activation z (N, 2F) and the routing tables; gathered rows are gathered again. Shapes or dtypes that `F.grouped_mm`
refuses (float64, rows that are no multiple of 16 bytes) take one GEMM per expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import activate, activate_backward
from .grouped_mm import grouped_bias_grad, grouped_rows, grouped_weight_grad, sum_by_token
from .routing import Routing


def moe_mlp_torch(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    activation: str,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
) -> Tensor:
    """Same value and gradients as `moe_mlp_reference`, by `F.grouped_mm`. Runs on any device.

    Shapes: x (T, D), w_in (E, 2F or F, D), w_out (E, D, F), b_in (E, 2F or F), b_out (E, D) -> (T, D), all of one
        dtype; routing.weight any float.
    """
    tables = (routing.token, routing.expert_offsets, routing.assignment, routing.token_offsets)
    return _Pipeline.apply(x, w_in, w_out, b_in, b_out, routing.weight, *tables, activation)  # pyright: ignore


def fits_grouped_mm(dtype: torch.dtype, *widths: int) -> bool:
    """Whether `F.grouped_mm` takes this dtype and rows of these widths."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not hasattr(F, "grouped_mm"):
        return False
    return all(width * dtype.itemsize % 16 == 0 for width in widths)


def _rows(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """w[e] @ x[n], w (E, O, D); padding rows are unspecified."""
    if x.shape[0] and fits_grouped_mm(x.dtype, w.shape[1], w.shape[2]):
        return F.grouped_mm(x, w.transpose(1, 2), offs=offsets[1:])
    return grouped_rows(x, w, None, None, None, offsets, None, None)


def _weight_grad(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Sum over an expert's rows of grad[n] x[n]^T, (E, O, D)."""
    if x.shape[0] and fits_grouped_mm(x.dtype, grad.shape[1], x.shape[1]):
        return F.grouped_mm(grad.T, x, offs=offsets[1:])
    return grouped_weight_grad(grad, x, None, None, offsets)


class _Pipeline(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, w_out, b_in, b_out, weight, token, expert_offsets, assignment, token_offsets, activation):
        tables = _Tables(token, expert_offsets, w_in.shape[0])
        z = _rows(x[tables.source], w_in, expert_offsets)
        if b_in is not None:
            z += b_in[tables.expert]
        y = _rows(activate(activation, z), w_out, expert_offsets)
        if b_out is not None:
            y += b_out[tables.expert]
        ctx.save_for_backward(
            x, w_in, w_out, b_in, b_out, weight, token, expert_offsets, assignment, token_offsets, z
        )  # fmt: skip
        ctx.activation = activation
        return sum_by_token(y, weight, assignment, token_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w_in, w_out, _, b_out, weight, token, expert_offsets, assignment, token_offsets, z = ctx.saved_tensors
        need_x, need_in, need_out, need_b_in, need_b_out, need_weight = ctx.needs_input_grad[:6]
        tables = _Tables(token, expert_offsets, w_in.shape[0])
        dx = dw_in = dw_out = db_in = db_out = dweight = None
        rows = grad[tables.source]
        a = activate(ctx.activation, z)
        da = _rows(rows, w_out.transpose(1, 2), expert_offsets)  # of the un-weighted activation
        if need_weight:
            dweight = torch.linalg.vecdot(da.to(weight.dtype), a.to(weight.dtype))
            if b_out is not None:
                dweight += torch.linalg.vecdot(rows.to(weight.dtype), b_out[tables.expert].to(weight.dtype))
            dweight = torch.where(tables.counts, dweight, 0)
        scale = torch.where(tables.counts, weight, 0)[:, None].to(x.dtype)
        if need_out:
            dw_out = _weight_grad(rows, a.mul_(scale), expert_offsets)
        del a
        if need_b_out:
            db_out = grouped_bias_grad(rows.mul_(scale), None, expert_offsets)
        del rows
        dz = activate_backward(ctx.activation, z, da.mul_(scale))
        del da, z
        if need_in:
            dw_in = _weight_grad(dz, x[tables.source], expert_offsets)
        if need_b_in:
            db_in = grouped_bias_grad(dz, None, expert_offsets)
        if need_x:
            dx = sum_by_token(_rows(dz, w_in.transpose(1, 2), expert_offsets), None, assignment, token_offsets)
        return dx, dw_in, dw_out, db_in, db_out, dweight, None, None, None, None, None


class _Tables:
    """Which assignments count, and their token and expert, 0 for those that do not."""

    def __init__(self, token: Tensor, expert_offsets: Tensor, num_experts: int):
        index = torch.arange(token.numel(), device=token.device, dtype=torch.int32)
        self.counts = index < expert_offsets[-1]
        self.source = torch.where(self.counts, token, 0)
        self.expert = torch.searchsorted(expert_offsets[1:], index, right=True).clamp_(max=num_experts - 1)
