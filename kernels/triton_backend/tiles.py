"""The tile table: which expert and which rows each tile of a grouped GEMM covers, built on the device.

The host knows only an upper bound, ceil(N / BLOCK_M) + E, and launches that many tiles; the table holds the true
number, so nothing has to be read back and a step can be captured in a CUDA graph.
"""

import triton
import triton.language as tl


@triton.jit
def tile_table_kernel(
    expert_offsets,
    table,
    bound,
    num_experts,
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    known = expert < num_experts
    start = tl.load(expert_offsets + expert, mask=known, other=0)
    end = tl.load(expert_offsets + expert + 1, mask=known, other=0)
    count = (end - start + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(count, 0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    passed = last[None, :] <= tile[:, None]  # experts whose tiles all come before
    mine = tl.sum(passed.to(tl.int32), 1)
    first = tl.sum(tl.where(passed, count[None, :], 0), 1)
    total = tl.sum(count, 0)
    used = tile < total
    row = tl.load(expert_offsets + mine, mask=used, other=0) + (tile - first) * BLOCK_M
    inside = tile < bound
    tl.store(table + 1 + tile, tl.where(used, mine, -1), mask=inside)
    tl.store(table + 1 + bound + tile, row, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(table, total)
