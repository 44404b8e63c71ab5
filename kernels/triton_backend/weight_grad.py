"""Weight gradients: a grouped GEMM whose contracted side is an expert's rows, a different number for each expert.

Where one expert's matrix has too few tiles to fill the device, an expert with many rows would leave it idle: its rows
are cut into chunks, whose products a second kernel sums in a fixed order. So skewed routing costs little more than
balanced routing, and no result depends on which program ends first.
"""

import triton
import triton.language as tl

from .device import multiply


@triton.jit
def _block(x, desc, index, row0, c0, C, stride, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows row0, row0 + 1, ... of x, or the rows that `index` names there, all of them an expert's."""
    if desc is not None:
        block = desc.load([row0, c0])
    else:
        row = row0 + tl.arange(0, ROWS)
        column = c0 + tl.arange(0, COLUMNS)
        if index is not None:
            row = tl.load(index + row)
        at = x + row[:, None].to(tl.int64) * stride + column[None, :]
        block = tl.load(at) if EVEN else tl.load(at, mask=(column < C)[None, :], other=0.0)
    return block


@triton.jit
def _last_block(x, index, row0, end, c0, C, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same for rows up to `end`, zeros after them."""
    row = row0 + tl.arange(0, ROWS)
    column = c0 + tl.arange(0, COLUMNS)
    row_in = row < end
    if index is not None:
        row = tl.load(index + row, mask=row_in, other=0)
    at = x + row[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(at, mask=row_in[:, None] & (column < C)[None, :], other=0.0)


@triton.jit
def _weight_tile(
    tile,
    a,
    a_desc,
    a_index,
    b,
    b_desc,
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
    p0 = (first_p + within % size) * BLOCK_M
    q0 = (within // size) * BLOCK_N
    if partial is None:
        expert = item
        start = tl.load(expert_offsets + expert)
        end = tl.load(expert_offsets + expert + 1)
    else:
        expert = tl.load(table + 1 + item)
        start = tl.load(table + 1 + bound + item)
        end = tl.minimum(start + rows_per_chunk, tl.load(expert_offsets + expert + 1))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    whole = start + (end - start) // BLOCK_K * BLOCK_K  # blocks of rows of this expert only need no mask
    for row0 in range(start, whole, BLOCK_K):
        left = _block(a, a_desc, a_index, row0, p0, P, stride_a, EVEN_P, BLOCK_K, BLOCK_M)
        right = _block(b, b_desc, b_index, row0, q0, Q, stride_b, EVEN_Q, BLOCK_K, BLOCK_N)
        acc = multiply(left.T, right, acc, PRECISION)
    if whole < end:
        left = _last_block(a, a_index, whole, end, p0, P, stride_a, BLOCK_K, BLOCK_M)
        right = _last_block(b, b_index, whole, end, q0, Q, stride_b, BLOCK_K, BLOCK_N)
        acc = multiply(left.T, right, acc, PRECISION)
    p, q = p0 + tl.arange(0, BLOCK_M), q0 + tl.arange(0, BLOCK_N)
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
    a_desc,
    a_index,
    b,
    b_desc,
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
            tile, a, a_desc, a_index, b, b_desc, b_index, out, partial, expert_offsets, table, bound, rows_per_chunk,
            P, Q, stride_a, stride_b, EVEN_P, EVEN_Q, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, PRECISION,
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
