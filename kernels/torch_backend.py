"""`moe_mlp` by torch's own grouped GEMM: gather, `F.grouped_mm`, activation, `F.grouped_mm`, sum by token.

The fallback on GPUs without Triton kernels and the pipeline that they have to beat. Saved for backward: x, the
pre-activation z (N, 2F) and the routing tables; gathered rows are gathered again. Shapes or dtypes that `F.grouped_mm`
refuses (float64, rows that are no multiple of 16 bytes) take one GEMM per expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate_backward_out, activate_out, is_gated
from .availability import FLOATS
from .fused_operator import ExpertLayer, fused_operator
from .grouped_mm import grouped_bias_grad, grouped_rows, grouped_weight_grad, sum_by_token


def fits_grouped_mm(dtype: torch.dtype, *widths: int) -> bool:
    """Whether `F.grouped_mm` takes this dtype and rows of these widths."""
    if dtype not in FLOATS or not hasattr(F, "grouped_mm"):
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


class RowTables:
    """Which assignments count, and their token and expert, 0 for those that do not."""

    def __init__(self, token: Tensor, expert_offsets: Tensor, num_experts: int):
        index = torch.arange(token.numel(), device=token.device, dtype=torch.int32)
        self.counts = index < expert_offsets[-1]
        self.source = torch.where(self.counts, token, 0)
        self.expert = torch.searchsorted(expert_offsets[1:], index, right=True).clamp_(max=num_experts - 1)

    @classmethod
    def of(cls, layer: ExpertLayer) -> RowTables:
        return cls(layer.token, layer.expert_offsets, layer.w_in.shape[0])


def forward_pass(layer: ExpertLayer, save_z: bool) -> tuple[Tensor, Tensor]:
    """Gather, GEMM, activation, GEMM, sum by token. See `fused_operator`."""
    offsets, b_out, tables = layer.expert_offsets, layer.b_out, RowTables.of(layer)
    z = _pre_activation(layer, tables)
    a = z.new_empty(z.shape[0], layer.w_out.shape[2])
    activate_out(layer.activation, z, a, a)
    if not save_z:
        z = z.new_empty(0)
    y = _rows(a, layer.w_out, offsets)
    del a
    if b_out is not None:
        _add_bias(y, b_out, tables)
    return sum_by_token(y, layer.weight, layer.assignment, layer.token_offsets), z


def backward_pass(layer: ExpertLayer, grad: Tensor, z: Tensor, needs: list[bool]) -> list[Tensor]:
    """The gradients, gathered rows gathered again. See `fused_operator`."""
    need_x, need_in, need_out, need_b_in, need_b_out, need_weight = needs
    x, w_in, w_out, b_out, weight = layer.x, layer.w_in, layer.w_out, layer.b_out, layer.weight
    activation, expert_offsets, tables = layer.activation, layer.expert_offsets, RowTables.of(layer)
    grads = layer.new_gradients([False] * 6)
    if not z.numel():
        z = _pre_activation(layer, tables)
    rows = grad[tables.source]
    a, dz = z.new_empty(z.shape[0], w_out.shape[2]), torch.empty_like(z)
    activate_out(activation, z, a, dz.chunk(2, dim=-1)[1] if is_gated(activation) else a)
    da = _rows(rows, w_out.transpose(1, 2), expert_offsets)  # of the un-weighted activation
    if need_weight:
        inner = torch.linalg.vecdot(da.to(weight.dtype), a.to(weight.dtype))
        if b_out is not None:  # one product over all tokens and experts takes less memory than b_out of each row
            inner += (grad @ b_out.T)[tables.source, tables.expert].to(weight.dtype)
        grads[5] = torch.where(tables.counts, inner, 0)
    scale = torch.where(tables.counts, weight, 0)[:, None].to(x.dtype)
    if need_out:
        grads[2] = _weight_grad(rows, a.mul_(scale), expert_offsets)
    del a
    if need_b_out:
        grads[4] = grouped_bias_grad(rows.mul_(scale), None, expert_offsets)
    del rows
    activate_backward_out(activation, z, da.mul_(scale), dz)
    del da, z
    if need_in:
        grads[1] = _weight_grad(dz, x[tables.source], expert_offsets)
    if need_b_in:
        grads[3] = grouped_bias_grad(dz, None, expert_offsets)
    if need_x:
        grads[0] = sum_by_token(
            _rows(dz, w_in.transpose(1, 2), expert_offsets), None, layer.assignment, layer.token_offsets
        )
    return grads


def _pre_activation(layer: ExpertLayer, tables: RowTables) -> Tensor:
    z = _rows(layer.x[tables.source], layer.w_in, layer.expert_offsets)
    if layer.b_in is not None:
        _add_bias(z, layer.b_in, tables)
    return z


def _add_bias(rows: Tensor, bias: Tensor, tables: RowTables) -> None:
    """rows[n] += bias[expert of n], some columns at a time, since the biases of all rows are as large as the rows."""
    columns = max(64, rows.shape[1] // 8)
    for part, own in zip(rows.split(columns, dim=1), bias.split(columns, dim=1)):
        part += own[tables.expert]


moe_mlp_torch = fused_operator("moe_mlp_torch", forward_pass, backward_pass)
