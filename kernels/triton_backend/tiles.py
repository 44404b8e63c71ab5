"""The tile table: which expert and which rows each tile of a grouped GEMM covers, built on the device.

One int32 tensor: the number of tiles, then for each tile its expert (-1: unused), its first row, and a slot: numbers
0, 1, ... for the tiles of experts that have several, -1 for an expert's only tile.

The host knows only an upper bound, ceil(N / BLOCK_M) + E, and launches that many tiles; the table holds the true
number, so nothing has to be read back and a step can be captured in a CUDA graph.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["bound", "rows_per_tile"])
def tile_table_kernel(
    expert_offsets,
    table,
    bound,
    num_experts,
    rows_per_tile,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    known = expert < num_experts
    start = tl.load(expert_offsets + expert, mask=known, other=0)
    end = tl.load(expert_offsets + expert + 1, mask=known, other=0)
    count = (end - start + rows_per_tile - 1) // rows_per_tile
    last = tl.cumsum(count, 0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    passed = last[None, :] <= tile[:, None]  # experts whose tiles all come before
    mine = tl.sum(passed.to(tl.int32), 1)
    first = tl.sum(tl.where(passed, count[None, :], 0), 1)
    total = tl.sum(count, 0)
    used = tile < total
    begin = tl.load(expert_offsets + mine, mask=used, other=0)
    many = tl.load(expert_offsets + mine + 1, mask=used, other=0) - begin > rows_per_tile
    slots_before = tl.sum(tl.where(passed & (count > 1)[None, :], count[None, :], 0), 1)
    inside = tile < bound
    tl.store(table + 1 + tile, tl.where(used, mine, -1), mask=inside)
    tl.store(table + 1 + bound + tile, begin + (tile - first) * rows_per_tile, mask=inside)
    tl.store(table + 1 + 2 * bound + tile, tl.where(many, slots_before + tile - first, -1), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(table, total)
