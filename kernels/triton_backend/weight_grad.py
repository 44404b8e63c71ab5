"""Weight gradients: a grouped GEMM whose contracted side is an expert's rows, a different number for each expert.

Where one expert's matrix has too few tiles to fill the device, an expert with many rows would leave it idle: its rows
are cut into chunks, whose products a second kernel sums in a fixed order. So skewed routing costs little more than
balanced routing, and no result depends on which program ends first.
"""

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
    partial,
    expert_offsets,
    table,
    bound,
    rows_per_chunk,
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
    item = tile // (tiles_p * tiles_q)
    within = tile % (tiles_p * tiles_q)
    first_p = (within // (GROUP_M * tiles_q)) * GROUP_M
    size = tl.minimum(tiles_p - first_p, GROUP_M)
    within = within % (GROUP_M * tiles_q)
    p = (first_p + within % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = (within // size) * BLOCK_N + tl.arange(0, BLOCK_N)
    if partial is None:
        expert = item
        start = tl.load(expert_offsets + expert)
        end = tl.load(expert_offsets + expert + 1)
    else:
        expert = tl.load(table + 1 + item)
        start = tl.load(table + 1 + bound + item)
        end = tl.minimum(start + rows_per_chunk, tl.load(expert_offsets + expert + 1))
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
    at = p[:, None].to(tl.int64) * Q + q[None, :]
    if partial is None:
        tl.store(out + expert.to(tl.int64) * P * Q + at, acc.to(out.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(table + 1 + 2 * bound + item)
        if slot < 0:
            tl.store(out + expert.to(tl.int64) * P * Q + at, acc.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(partial + slot.to(tl.int64) * P * Q + at, acc, mask=inside)


@triton.jit(do_not_specialize=["bound", "rows_per_chunk"])
def weight_grad_kernel(
    a,
    a_index,
    b,
    b_index,
    out,
    partial,
    expert_offsets,
    table,
    bound,
    rows_per_chunk,
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
    """out[e] = a[a_index].T @ b[b_index] over the rows of expert e: (E, P, Q); zeros for an expert without rows.

    With `partial` (slots, P, Q) the work goes by the chunks of `table`: a chunk with a slot writes there, an expert's
    only chunk writes to `out`, and experts of no or of several chunks are left to `sum_chunks_kernel`.
    """
    items = num_experts if partial is None else tl.load(table)
    tiles = items * tl.cdiv(P, BLOCK_M) * tl.cdiv(Q, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _weight_tile(
            tile, a, a_index, b, b_index, out, partial, expert_offsets, table, bound, rows_per_chunk, P, Q,
            stride_a, stride_b, EVEN_P, EVEN_Q, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows_per_chunk"])
def sum_chunks_kernel(
    partial,
    out,
    expert_offsets,
    num_experts,
    rows_per_chunk,
    SIZE,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[e] = the sum of the slots of expert e, in ascending order; zero if it has no rows, untouched if one chunk."""
    expert = tl.program_id(0)
    rows = tl.load(expert_offsets + expert + 1) - tl.load(expert_offsets + expert)
    count = (rows + rows_per_chunk - 1) // rows_per_chunk
    if count != 1:
        e = tl.arange(0, EXPERTS)
        before = e < expert
        rows_e = tl.load(expert_offsets + e + 1, mask=before, other=0) - tl.load(
            expert_offsets + e, mask=before, other=0
        )
        count_e = (rows_e + rows_per_chunk - 1) // rows_per_chunk
        first = tl.sum(tl.where(count_e > 1, count_e, 0), 0)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = i < SIZE
        acc = tl.zeros((BLOCK,), tl.float32)
        at = partial + first.to(tl.int64) * SIZE + i
        for _ in range(count):
            acc += tl.load(at, mask=inside, other=0.0)
            at += SIZE
        tl.store(out + expert.to(tl.int64) * SIZE + i, acc.to(out.dtype.element_ty), mask=inside)


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
