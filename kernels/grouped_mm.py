"""Grouped GEMM: rows sorted by expert, each expert with weights of its own; gathered and scattered rows included.

`grouped_mm` is the plain public form, `scatter2scatter` (in scatter2scatter.py) the one that gathers and scatters. Both
rest on the operators below: Triton kernels where triton runs the device and the dtype, one GEMM per expert elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .availability import runs_triton
from .errors import ConfigError
from .needed import needed_gradients
from .operators import registered

_PADDING_BAG = 64  # rows


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """y[n] = w[e] @ x[n], where expert e owns the rows offsets[e] <= n < offsets[e + 1].

    Differentiable in x and w. Rows past offsets[E] are padding: they are not read, their result is zero.

    Args:
        x: (N, D).
        w: (E, O, D), of the dtype of x; a transposed view of (E, D, O) serves as well, without a copy.
        offsets: (E + 1,) int32 ascending, offsets[0] = 0.

    Returns: (N, O).
    Raises: ConfigError if the shapes or dtypes do not fit.
    """
    check(x, w, offsets)
    return grouped_rows(x, w, None, None, None, offsets, None, None)


def check(x: Tensor, w: Tensor, offsets: Tensor) -> None:
    """Raise ConfigError unless x (N, D), w (E, O, D) and offsets (E + 1,) fit together."""
    if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[2]:
        raise ConfigError(f"x has shape {tuple(x.shape)} and w {tuple(w.shape)}, allowed: (N, D) and (E, O, D)")
    if x.dtype != w.dtype:
        raise ConfigError(f"x is {x.dtype} and w {w.dtype}, allowed: the same dtype")
    if tuple(offsets.shape) != (w.shape[0] + 1,) or offsets.dtype != torch.int32:
        raise ConfigError(f"offsets is {offsets.dtype} {tuple(offsets.shape)}, allowed: int32 {(w.shape[0] + 1,)}")


def _transposed(w: Tensor) -> tuple[Tensor, bool]:
    """w (E, O, D) with contiguous rows, or its transposed view if that has them, and whether it is transposed."""
    if w.stride(2) != 1 and w.stride(1) == 1:
        return w.transpose(1, 2), True
    return w, False


@registered("grouped_rows")
def grouped_rows(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    x_index: Tensor | None,
    y_index: Tensor | None,
    offsets: Tensor,
    assignment: Tensor | None,
    token_offsets: Tensor | None,
) -> Tensor:
    """y[y_index[n]] = w[e] @ x[x_index[n]] + bias[e] for the rows n of expert e; (N, O), zero where nothing is written.

    Without an index it is the row itself. y_index, and x_index unless (assignment, token_offsets) say which rows use
    a token, must not name a row twice.
    """
    rows = x.shape[0] if x_index is None else x_index.numel()
    if runs_triton(x) and rows:
        from .triton_backend.primitives import rows_forward

        return rows_forward(x, *_transposed(w), bias, x_index, y_index, offsets, rows)
    y = x.new_zeros(rows, w.shape[1])
    for expert, span in _spans(offsets):
        source = x[span] if x_index is None else x.index_select(0, x_index[span])
        result = source @ w[expert].T if bias is None else torch.addmm(bias[expert], source, w[expert].T)
        if y_index is None:
            y[span] = result
        else:
            y.index_copy_(0, y_index[span].long(), result)
    return y


@grouped_rows.register_fake
def _(x, w, bias, x_index, y_index, offsets, assignment, token_offsets):
    return x.new_empty(x.shape[0] if x_index is None else x_index.shape[0], w.shape[1])


@registered("grouped_weight_grad")
def grouped_weight_grad(
    grad: Tensor, x: Tensor, y_index: Tensor | None, x_index: Tensor | None, offsets: Tensor
) -> Tensor:
    """Sum over the rows n of expert e of grad[y_index[n]] x[x_index[n]]^T: (E, O, D)."""
    if runs_triton(x) and grad.shape[0]:
        from .triton_backend.primitives import weight_grad

        return weight_grad(grad, x, y_index, x_index, offsets)
    out = x.new_zeros(offsets.numel() - 1, grad.shape[1], x.shape[1])
    for expert, span in _spans(offsets):
        left = grad[span] if y_index is None else grad.index_select(0, y_index[span])
        right = x[span] if x_index is None else x.index_select(0, x_index[span])
        torch.mm(left.T, right, out=out[expert])
    return out


@grouped_weight_grad.register_fake
def _(grad, x, y_index, x_index, offsets):
    return x.new_empty(offsets.shape[0] - 1, grad.shape[1], x.shape[1])


@registered("grouped_bias_grad")
def grouped_bias_grad(grad: Tensor, y_index: Tensor | None, offsets: Tensor) -> Tensor:
    """Sum over the rows n of expert e of grad[y_index[n]]: (E, O)."""
    if runs_triton(grad) and grad.shape[0]:
        from .triton_backend.primitives import bias_grad

        return bias_grad(grad, y_index, offsets)
    out = grad.new_zeros(offsets.numel() - 1, grad.shape[1])
    for expert, span in _spans(offsets):
        rows = grad[span] if y_index is None else grad.index_select(0, y_index[span])
        out[expert] = rows.sum(0)
    return out


@grouped_bias_grad.register_fake
def _(grad, y_index, offsets):
    return grad.new_empty(offsets.shape[0] - 1, grad.shape[1])


@registered("sum_by_token")
def sum_by_token(y: Tensor, weight: Tensor | None, assignment: Tensor, token_offsets: Tensor) -> Tensor:
    """out[t] = sum over the assignments n of token t of weight[n] * y[n], (T, D).

    Accumulated in float32 at least, by bags of rows: no atomics, and no gathered copy of y.
    """
    num_tokens = token_offsets.numel() - 1
    if runs_triton(y) and y.numel() and num_tokens:
        from .triton_backend.primitives import combine

        return combine(y, weight, assignment, token_offsets)
    if not y.numel() or not num_tokens:
        return y.new_zeros(num_tokens, y.shape[1])
    # Padding may hold anything: it goes to bags of its own, short ones, since a bag is summed by one thread block.
    rows = assignment.numel()
    bound = torch.arange(0, rows + _PADDING_BAG, _PADDING_BAG, dtype=torch.int32, device=y.device)
    bags = torch.cat([token_offsets, (token_offsets[-1] + bound[1:]).clamp_(max=rows)])
    counts = torch.arange(rows, device=y.device) < token_offsets[-1]
    index = torch.where(counts, assignment, 0)
    scale = None if weight is None else torch.where(counts, weight[index], 0).to(y.dtype)
    sums = embedding_bag(index, y, bags, mode="sum", per_sample_weights=scale, include_last_offset=True)
    return sums[:num_tokens]


@sum_by_token.register_fake
def _(y, weight, assignment, token_offsets):
    return y.new_empty(token_offsets.shape[0] - 1, y.shape[1])


def _spans(offsets: Tensor):
    """(expert, its rows) for each expert that has any."""
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if start < end:
            yield expert, slice(start, end)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad):
    x, w, bias, x_index, y_index, offsets, assignment, token_offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_w = grad_bias = None
    need_x, need_w, need_bias = needed_gradients(ctx, 3)
    if need_x:
        by_token = assignment is not None
        grad_x = grouped_rows(
            grad, w.transpose(1, 2), None, y_index, None if by_token else x_index, offsets, None, None
        )  # fmt: skip
        if by_token:
            grad_x = sum_by_token(grad_x, None, assignment, token_offsets)
    if need_w:
        grad_w = grouped_weight_grad(grad, x, y_index, x_index, offsets)
    if need_bias:
        grad_bias = grouped_bias_grad(grad, y_index, offsets)
    return grad_x, grad_w, grad_bias, None, None, None, None, None


grouped_rows.register_autograd(_gradient, setup_context=_setup)
