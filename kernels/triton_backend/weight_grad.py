"""Weight gradients: a grouped GEMM whose contracted side is an expert's rows, a different number for each expert."""

import triton
import triton.language as tl

from .device import multiply


@triton.jit
def _weight_tile(
    tile,
    a,
    a_index,
    b,
    b_index,
    out,
    expert_offsets,
    P,
    Q,
    stride_a,
    stride_b,
    EVEN_P: tl.constexpr,
    EVEN_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_p, tiles_q = tl.cdiv(P, BLOCK_M), tl.cdiv(Q, BLOCK_N)
    expert = tile // (tiles_p * tiles_q)
    within = tile % (tiles_p * tiles_q)
    first_p = (within // (GROUP_M * tiles_q)) * GROUP_M
    size = tl.minimum(tiles_p - first_p, GROUP_M)
    within = within % (GROUP_M * tiles_q)
    p = (first_p + within % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = (within // size) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row0 in range(start, end, BLOCK_K):
        row = row0 + k
        row_in = row < end
        a_row, b_row = row, row
        if a_index is not None:
            a_row = tl.load(a_index + row, mask=row_in, other=0)
        if b_index is not None:
            b_row = tl.load(b_index + row, mask=row_in, other=0)
        a_in = row_in[:, None] if EVEN_P else row_in[:, None] & (p < P)[None, :]
        b_in = row_in[:, None] if EVEN_Q else row_in[:, None] & (q < Q)[None, :]
        left = tl.load(a + a_row[:, None].to(tl.int64) * stride_a + p[None, :], mask=a_in, other=0.0)
        right = tl.load(b + b_row[:, None].to(tl.int64) * stride_b + q[None, :], mask=b_in, other=0.0)
        acc = multiply(left.T, right, acc, PRECISION)
    inside = (p < P)[:, None] & (q < Q)[None, :]
    at = out + expert.to(tl.int64) * P * Q + p[:, None].to(tl.int64) * Q + q[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def weight_grad_kernel(
    a,
    a_index,
    b,
    b_index,
    out,
    expert_offsets,
    num_experts,
    P,
    Q,
    stride_a,
    stride_b,
    EVEN_P: tl.constexpr,
    EVEN_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[e] = a[a_index].T @ b[b_index] over the rows of expert e: (E, P, Q); zeros for an expert without rows."""
    tiles = num_experts * tl.cdiv(P, BLOCK_M) * tl.cdiv(Q, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _weight_tile(
            tile, a, a_index, b, b_index, out, expert_offsets, P, Q, stride_a, stride_b,
            EVEN_P, EVEN_Q, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, PRECISION,
        )  # fmt: skip


@triton.jit
def bias_grad_kernel(
    rows,
    index,
    scale,
    out,
    expert_offsets,
    P,
    stride,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out[e] = sum of scale * rows[index] over the rows of expert e: (E, P). No scale: 1; no index: the row itself."""
    expert = tl.program_id(0)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    start = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1)
    acc = tl.zeros((BLOCK_P,), tl.float32)
    for row0 in range(start, end, BLOCK_K):
        row = row0 + tl.arange(0, BLOCK_K)
        row_in = row < end
        source = row
        if index is not None:
            source = tl.load(index + row, mask=row_in, other=0)
        at = rows + source[:, None].to(tl.int64) * stride + p[None, :]
        values = tl.load(at, mask=row_in[:, None] & (p < P)[None, :], other=0.0).to(tl.float32)
        if scale is not None:
            values *= tl.load(scale + row, mask=row_in, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(values, 0)
    tl.store(out + expert.to(tl.int64) * P + p, acc.to(out.dtype.element_ty), mask=p < P)
