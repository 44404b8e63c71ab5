"""Grouped GEMM over rows sorted by expert: tiles of (rows of one expert) x (output columns).

Three kernels share one main loop: `up` with the activation in its epilogue, `rows` with nothing but a bias, and `dact`
with the gradient of the activation. Rows may be gathered while they are loaded; weights, and rows in place, come by TMA
descriptor or by pointer. A row beyond the end of its expert loads another row instead of a mask: its result is not
stored.

A program computes every num_programs-th tile: one each if the grid has as many programs as tiles, several if the grid
is persistent, one program per multiprocessor.
"""

# Triton annotates constants as tl.constexpr and takes plain numbers: pyright need not agree.
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from .device import act, act_grad, factor, factor_grad, halves, locate, multiply, quarters


@triton.jit
def _product(
    x,  # first element of each row, (BLOCK_M, 1) pointers
    x_desc,  # or rows row0, row0 + 1, ... by descriptor: those past the expert's end are not stored
    row0,
    w,  # weights of all experts: (E, HALVES, outputs, K) or, with W_K_ROWS, (E, K, outputs)
    w_desc,
    expert,
    n0,
    N,
    K,
    stride_we,
    stride_wr,
    HALVES: tl.constexpr,
    W_K_ROWS: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x @ w[expert].T (or x @ w[expert]) for one tile: (BLOCK_M, HALVES * BLOCK_N) float32."""
    k = tl.arange(0, BLOCK_K)
    column = tl.arange(0, HALVES * BLOCK_N)
    w += expert.to(tl.int64) * stride_we
    if W_K_ROWS:
        w_tile = w + (n0 + column)[None, :]
    else:
        row = (column // BLOCK_N) * N + tl.minimum(n0 + column % BLOCK_N, N - 1)
        w_tile = w + row[:, None].to(tl.int64) * stride_wr
    acc = tl.zeros((BLOCK_M, HALVES * BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if x_desc is not None:
            a = x_desc.load([row0, k0])
        elif EVEN_K:
            a = tl.load(x + (k0 + k)[None, :])
        else:
            a = tl.load(x + (k0 + k)[None, :], mask=(k0 + k)[None, :] < K, other=0.0)
        if W_K_ROWS:
            if TMA:
                b = w_desc.load([expert, k0, n0]).reshape(BLOCK_K, BLOCK_N)
            elif EVEN_K and EVEN_N:
                b = tl.load(w_tile + (k0 + k)[:, None].to(tl.int64) * stride_wr)
            else:
                inside = ((k0 + k)[:, None] < K) & ((n0 + column)[None, :] < N)
                b = tl.load(w_tile + (k0 + k)[:, None].to(tl.int64) * stride_wr, mask=inside, other=0.0)
        else:
            if TMA:
                c = w_desc.load([expert, 0, n0, k0]).reshape(HALVES * BLOCK_N, BLOCK_K)
            elif EVEN_K:
                c = tl.load(w_tile + (k0 + k)[None, :])
            else:
                c = tl.load(w_tile + (k0 + k)[None, :], mask=(k0 + k)[None, :] < K, other=0.0)
            b = c.T
        acc = multiply(a, b, acc, PRECISION)
    return acc


@triton.jit
def _up_store(
    gate,
    up,
    expert,
    row,
    row_in,
    n0,
    bias,
    z,
    a,
    F,
    ACT: tl.constexpr,
    HALVES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = n0 + tl.arange(0, COLUMNS)
    column_in = column < F
    inside = row_in[:, None] & column_in[None, :]
    if bias is not None:
        first = bias + expert.to(tl.int64) * HALVES * F + column
        gate += tl.load(first, mask=column_in, other=0.0).to(tl.float32)[None, :]
        if HALVES == 2:
            up += tl.load(first + F, mask=column_in, other=0.0).to(tl.float32)[None, :]
    wide = row[:, None].to(tl.int64)
    if z is not None:
        at = z + wide * HALVES * F + column[None, :]
        tl.store(at, gate.to(z.dtype.element_ty), mask=inside)
        if HALVES == 2:
            tl.store(at + F, up.to(z.dtype.element_ty), mask=inside)
    if a is not None:
        h = act(ACT, gate)
        if HALVES == 2:
            h *= factor(ACT, up)
        tl.store(a + wide * F + column[None, :], h.to(a.dtype.element_ty), mask=inside)


@triton.jit
def _up_tile(
    row_tile,
    n0,
    x,
    token,
    w,
    w_desc,
    bias,
    z,
    a,
    expert_offsets,
    table,
    bound,
    F,
    D,
    stride_x,
    stride_we,
    stride_wr,
    ACT: tl.constexpr,
    HALVES: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.load(table + 1 + row_tile)
    row = tl.load(table + 1 + bound + row_tile) + tl.arange(0, BLOCK_M)
    row_in = row < tl.load(expert_offsets + expert + 1)
    source = tl.load(token + row, mask=row_in, other=0).to(tl.int64)
    acc = _product(
        x + source[:, None] * stride_x, None, 0, w, w_desc, expert, n0, F, D, stride_we, stride_wr,
        HALVES, False, TMA, EVEN_K, True, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    gate, up = halves(acc, HALVES, BLOCK_M, BLOCK_N)
    COLUMNS: tl.constexpr = BLOCK_N // PARTS
    if PARTS == 1:
        _up_store(gate, up, expert, row, row_in, n0, bias, z, a, F, ACT, HALVES, COLUMNS)
    elif PARTS == 2:
        gate_0, gate_1 = halves(gate, 2, BLOCK_M, COLUMNS)
        up_0, up_1 = halves(up, 2, BLOCK_M, COLUMNS)
        _up_store(gate_0, up_0, expert, row, row_in, n0, bias, z, a, F, ACT, HALVES, COLUMNS)
        _up_store(gate_1, up_1, expert, row, row_in, n0 + COLUMNS, bias, z, a, F, ACT, HALVES, COLUMNS)
    else:
        gate_0, gate_1, gate_2, gate_3 = quarters(gate, BLOCK_M, COLUMNS)
        up_0, up_1, up_2, up_3 = quarters(up, BLOCK_M, COLUMNS)
        _up_store(gate_0, up_0, expert, row, row_in, n0, bias, z, a, F, ACT, HALVES, COLUMNS)
        _up_store(gate_1, up_1, expert, row, row_in, n0 + COLUMNS, bias, z, a, F, ACT, HALVES, COLUMNS)
        _up_store(gate_2, up_2, expert, row, row_in, n0 + 2 * COLUMNS, bias, z, a, F, ACT, HALVES, COLUMNS)
        _up_store(gate_3, up_3, expert, row, row_in, n0 + 3 * COLUMNS, bias, z, a, F, ACT, HALVES, COLUMNS)


@triton.jit(do_not_specialize=["bound"])
def up_kernel(
    x,
    token,
    w,
    w_desc,
    bias,
    z,
    a,
    expert_offsets,
    table,
    bound,
    F,
    D,
    stride_x,
    stride_we,
    stride_wr,
    ACT: tl.constexpr,
    HALVES: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z = x[token] @ w[expert].T + bias, (N, HALVES * F), and the activation a (N, F); either may be None."""
    columns = tl.cdiv(F, BLOCK_N)
    total = tl.load(table)
    for tile in range(tl.program_id(0), total * columns, tl.num_programs(0)):
        row_tile, column_tile = locate(tile, total, columns, GROUP_M)
        _up_tile(
            row_tile, column_tile * BLOCK_N, x, token, w, w_desc, bias, z, a, expert_offsets, table, bound, F, D,
            stride_x, stride_we, stride_wr, ACT, HALVES, TMA, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, PRECISION,
        )  # fmt: skip


@triton.jit
def _rows_tile(
    row_tile,
    n0,
    x,
    x_desc,
    x_index,
    w,
    w_desc,
    bias,
    y,
    y_index,
    expert_offsets,
    table,
    bound,
    N,
    K,
    stride_x,
    stride_we,
    stride_wr,
    stride_y,
    W_K_ROWS: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.load(table + 1 + row_tile)
    first = tl.load(table + 1 + bound + row_tile)
    row = first + tl.arange(0, BLOCK_M)
    row_in = row < tl.load(expert_offsets + expert + 1)
    if x_index is not None:
        source = tl.load(x_index + row, mask=row_in, other=0).to(tl.int64)
    else:
        source = tl.where(row_in, row, first).to(tl.int64)
    acc = _product(
        x + source[:, None] * stride_x, x_desc, first, w, w_desc, expert, n0, N, K, stride_we, stride_wr,
        1, W_K_ROWS, TMA, EVEN_K, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    column = n0 + tl.arange(0, BLOCK_N)
    column_in = column < N
    if bias is not None:
        acc += tl.load(bias + expert.to(tl.int64) * N + column, mask=column_in, other=0.0).to(tl.float32)[None, :]
    target = row
    if y_index is not None:
        target = tl.load(y_index + row, mask=row_in, other=0)
    at = y + target[:, None].to(tl.int64) * stride_y + column[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=row_in[:, None] & column_in[None, :])


@triton.jit(do_not_specialize=["bound"])
def rows_kernel(
    x,
    x_desc,
    x_index,
    w,
    w_desc,
    bias,
    y,
    y_index,
    expert_offsets,
    table,
    bound,
    N,
    K,
    stride_x,
    stride_we,
    stride_wr,
    stride_y,
    W_K_ROWS: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[y_index] = x[x_index] @ w[expert].T + bias, with W_K_ROWS x[x_index] @ w[expert]; no index: the row itself."""
    columns = tl.cdiv(N, BLOCK_N)
    total = tl.load(table)
    for tile in range(tl.program_id(0), total * columns, tl.num_programs(0)):
        row_tile, column_tile = locate(tile, total, columns, GROUP_M)
        _rows_tile(
            row_tile, column_tile * BLOCK_N, x, x_desc, x_index, w, w_desc, bias, y, y_index, expert_offsets, table,
            bound, N, K, stride_x, stride_we, stride_wr, stride_y,
            W_K_ROWS, TMA, EVEN_K, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip


@triton.jit
def _dact_store(
    g,
    scale,
    row,
    row_in,
    n0,
    z,
    dz,
    weighted,
    F,
    ACT: tl.constexpr,
    HALVES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of the activation for some columns; returns each row's g . act(z)."""
    column = n0 + tl.arange(0, COLUMNS)
    inside = row_in[:, None] & (column < F)[None, :]
    wide = row[:, None].to(tl.int64)
    at_z = wide * HALVES * F + column[None, :]
    gate = tl.load(z + at_z, mask=inside, other=0.0).to(tl.float32)
    h = act(ACT, gate)
    slope = act_grad(ACT, gate)
    if HALVES == 2:
        up = tl.load(z + at_z + F, mask=inside, other=0.0).to(tl.float32)
        tl.store(dz + at_z + F, factor_grad(ACT, up, g * scale * h).to(dz.dtype.element_ty), mask=inside)
        up = factor(ACT, up)
        h *= up
        slope *= up
    tl.store(dz + at_z, (g * scale * slope).to(dz.dtype.element_ty), mask=inside)
    tl.store(weighted + wide * F + column[None, :], (h * scale).to(weighted.dtype.element_ty), mask=inside)
    return tl.sum(tl.where(inside, g * h, 0.0), 1)


@triton.jit
def _dact_tile(
    row_tile,
    column_tile,
    grad,
    token,
    w,
    w_desc,
    z,
    weight,
    dz,
    weighted,
    partial,
    expert_offsets,
    table,
    bound,
    num_rows,
    F,
    D,
    stride_g,
    stride_we,
    stride_wr,
    ACT: tl.constexpr,
    HALVES: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n0 = column_tile * BLOCK_N
    expert = tl.load(table + 1 + row_tile)
    row = tl.load(table + 1 + bound + row_tile) + tl.arange(0, BLOCK_M)
    row_in = row < tl.load(expert_offsets + expert + 1)
    source = tl.load(token + row, mask=row_in, other=0).to(tl.int64)
    g = _product(  # the gradient of the un-weighted activation
        grad + source[:, None] * stride_g, None, 0, w, w_desc, expert, n0, F, D, stride_we, stride_wr,
        1, True, TMA, EVEN_K, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    scale = tl.load(weight + row, mask=row_in, other=0.0).to(tl.float32)[:, None]
    COLUMNS: tl.constexpr = BLOCK_N // PARTS
    if PARTS == 1:
        inner = _dact_store(g, scale, row, row_in, n0, z, dz, weighted, F, ACT, HALVES, COLUMNS)
    elif PARTS == 2:
        g_0, g_1 = halves(g, 2, BLOCK_M, COLUMNS)
        inner = _dact_store(g_0, scale, row, row_in, n0, z, dz, weighted, F, ACT, HALVES, COLUMNS)
        inner += _dact_store(g_1, scale, row, row_in, n0 + COLUMNS, z, dz, weighted, F, ACT, HALVES, COLUMNS)
    else:
        g_0, g_1, g_2, g_3 = quarters(g, BLOCK_M, COLUMNS)
        inner = _dact_store(g_0, scale, row, row_in, n0, z, dz, weighted, F, ACT, HALVES, COLUMNS)
        inner += _dact_store(g_1, scale, row, row_in, n0 + COLUMNS, z, dz, weighted, F, ACT, HALVES, COLUMNS)
        inner += _dact_store(g_2, scale, row, row_in, n0 + 2 * COLUMNS, z, dz, weighted, F, ACT, HALVES, COLUMNS)
        inner += _dact_store(g_3, scale, row, row_in, n0 + 3 * COLUMNS, z, dz, weighted, F, ACT, HALVES, COLUMNS)
    tl.store(partial + column_tile.to(tl.int64) * num_rows + row, inner, mask=row_in)


@triton.jit(do_not_specialize=["bound", "num_rows"])
def dact_kernel(
    grad,
    token,
    w,
    w_desc,
    z,
    weight,
    dz,
    weighted,
    partial,
    expert_offsets,
    table,
    bound,
    num_rows,
    F,
    D,
    stride_g,
    stride_we,
    stride_wr,
    ACT: tl.constexpr,
    HALVES: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient through the second weights and the activation, g = grad[token] @ w[expert], in one pass.

    Writes dz = weight * g * act'(z), weighted = weight * act(z) and partial (column tiles, N): g . act(z) per row,
    whose sum over the column tiles is the gradient of the combine weight.
    """
    columns = tl.cdiv(F, BLOCK_N)
    total = tl.load(table)
    for tile in range(tl.program_id(0), total * columns, tl.num_programs(0)):
        row_tile, column_tile = locate(tile, total, columns, GROUP_M)
        _dact_tile(
            row_tile, column_tile, grad, token, w, w_desc, z, weight, dz, weighted, partial, expert_offsets, table,
            bound, num_rows, F, D, stride_g, stride_we, stride_wr,
            ACT, HALVES, TMA, EVEN_K, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, PRECISION,
        )  # fmt: skip
