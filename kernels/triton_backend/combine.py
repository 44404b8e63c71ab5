"""Kernels that move rows and reduce them: all bound by memory, none with atomics."""

import triton
import triton.language as tl


@triton.jit
def combine_kernel(
    y,
    weight,
    assignment,
    token_offsets,
    out,
    D,
    stride_y,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = sum over the assignments n of token t of weight[n] * y[n]; no weight: 1. Without any: zero."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_in = column < D
    start = tl.load(token_offsets + token)
    end = tl.load(token_offsets + token + 1)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(start, end, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        used = slot < end
        row = tl.load(assignment + slot, mask=used, other=0)
        at = y + row[:, None].to(tl.int64) * stride_y + column[None, :]
        values = tl.load(at, mask=used[:, None] & column_in[None, :], other=0.0).to(tl.float32)
        if weight is not None:
            values *= tl.load(weight + row, mask=used, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(values, 0)
    tl.store(out + token * D + column, acc.to(out.dtype.element_ty), mask=column_in)


@triton.jit(do_not_specialize=["bound"])
def bias_dot_kernel(
    grad,
    token,
    bias,
    partial,
    expert_offsets,
    table,
    bound,
    D,
    stride_g,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partial[n] = grad[token[n]] . bias[expert of n]: what the second bias adds to a combine weight's gradient."""
    tile = tl.program_id(0)
    if tile < tl.load(table):
        expert = tl.load(table + 1 + tile)
        row = tl.load(table + 1 + bound + tile) + tl.arange(0, BLOCK_M)
        row_in = row < tl.load(expert_offsets + expert + 1)
        source = tl.load(token + row, mask=row_in, other=0)[:, None].to(tl.int64)
        acc = tl.zeros((BLOCK_M,), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            b = tl.load(bias + expert.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
            g = tl.load(grad + source * stride_g + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
            acc += tl.sum(g * b[None, :], 1)
        tl.store(partial + row, acc, mask=row_in)


@triton.jit(do_not_specialize=["num_rows"])
def sum_partials_kernel(
    partial,
    out,
    expert_offsets,
    num_experts,
    num_rows,
    NUM_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n] = sum of partial[:, n] in ascending order, zero for padding."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = row < tl.load(expert_offsets + num_experts)
    acc = tl.zeros((BLOCK,), tl.float32)
    at = partial + row
    for _ in range(NUM_PARTIALS):
        acc += tl.load(at, mask=counts, other=0.0)
        at += num_rows
    tl.store(out + row, acc.to(out.dtype.element_ty), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def zero_padding_kernel(y, offsets, num_experts, num_rows, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """y[n] = 0 for the rows past the last expert's: programs over real rows leave at once."""
    first = tl.program_id(0) * ROWS
    end = tl.load(offsets + num_experts)
    if first + ROWS > end:
        row = first + tl.arange(0, ROWS)
        padding = (row >= end) & (row < num_rows)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            at = y + row[:, None].to(tl.int64) * D + d[None, :]
            tl.store(at, tl.zeros((ROWS, BLOCK_D), y.dtype.element_ty), mask=padding[:, None] & (d < D)[None, :])
