"""How experts are cut into chunks, whose rows stay in cache and whose GEMMs are batched."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

_HALF = (torch.bfloat16, torch.float16)
CHUNK_BYTES = 4 << 20  # of the widest buffer of a chunk of several experts
_TALLEST_FULL_PRECISION = 96  # rows of an expert: beyond, a GEMM of its own is faster than a batch with empty rows


@dataclass
class Chunk:
    """Experts with rows, one after the other, that are worked on together.

    Each has a slot of `height` rows in the buffers of the chunk. What it does not fill is zero where it counts.

    Attributes:
        rows: their assignments.
        height: rows of a slot.
        counts: assignments of each expert.
        runs: slots, and the experts in them, for each run of experts without a gap.
    """

    rows: slice
    height: int = 0
    counts: list[int] = field(default_factory=list)
    runs: list[tuple[slice, slice]] = field(default_factory=list)

    @property
    def slots(self) -> int:
        return len(self.counts)

    @property
    def size(self) -> int:
        return self.slots * self.height

    def add(self, expert: int, count: int, height: int) -> None:
        slot = self.slots
        if self.runs and self.runs[-1][1].stop == expert:
            slots, experts = self.runs.pop()
            self.runs.append((slice(slots.start, slot + 1), slice(experts.start, expert + 1)))
        else:
            self.runs.append((slice(slot, slot + 1), slice(expert, expert + 1)))
        self.rows = slice(self.rows.start, self.rows.stop + count)
        self.counts.append(count)
        self.height = height


def split(offsets: list[int], widest: int, dtype: torch.dtype, batch: bool) -> list[Chunk]:
    """Cut the experts that have rows into chunks.

    Args:
        offsets: the assignments of expert e are [offsets[e], offsets[e + 1]).
        widest: row length of the widest buffer.
        batch: whether a chunk may have several experts.
    """
    half = dtype in _HALF
    limit = CHUNK_BYTES // (widest * dtype.itemsize) if batch else 0
    chunks: list[Chunk] = []
    for expert, (start, end) in enumerate(zip(offsets, offsets[1:])):
        if start == end:
            continue
        height = _rounded(end - start) if half else end - start
        if chunks:
            chunk = chunks[-1]
            common, slots = max(chunk.height, height), chunk.slots + 1
            filled = end - chunk.rows.start
            # Empty rows cost time; batching saves an expert about as much as 16 rows take.
            worth_it = common * slots - filled <= filled // 32 + 16 * slots
            if common * slots <= limit and worth_it and (half or common <= _TALLEST_FULL_PRECISION):
                chunk.add(expert, end - start, common)
                continue
        chunks.append(Chunk(slice(start, start)))
        chunks[-1].add(expert, end - start, height)
    return chunks


def _rounded(count: int) -> int:
    """The next height of a GEMM in half precision: at most 15 rows or 1/16 more.

    Its code is generated for each shape anew, which takes longer than the GEMM itself, and kept for about a thousand
    shapes. With heights as they come, training would meet new ones in each step.
    """
    least = 1 if count <= 8 else 8 if count <= 64 else 16
    step = max(least, 1 << (count.bit_length() - 1) >> 5)
    return -(-count // step) * step
