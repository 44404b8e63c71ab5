"""The rows of a chunk in its buffers, and the products with its experts' weights.

Two kinds with the same methods: a chunk of one expert, which most chunks of a training step are, works on whole buffers
with as few calls as can be, as the calls themselves take time; a chunk of several has a slot of equal height for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .chunks import Chunk
from .rows import gather


def slots_of(chunks: Sequence[Chunk], token: Tensor, scale: Tensor) -> Iterator[OneExpert | SeveralExperts]:
    """The slots of one chunk after the other.

    Args:
        token: (N,) int32, of each assignment.
        scale: (N, 1), its combine weight.
    """
    long = token.long()
    steps = torch.arange(max((chunk.height for chunk in chunks), default=0) + 1, device=token.device, dtype=token.dtype)
    for chunk in chunks:
        kind = OneExpert if chunk.slots == 1 else SeveralExperts
        yield kind(chunk, token[chunk.rows], long[chunk.rows], scale[chunk.rows], steps)


class OneExpert:
    """A buffer is filled from its first row on. GEMMs may have more rows, see `chunks`; their rest is left out.

    Attributes:
        place: the chunk's assignments.
        height: rows of a buffer that GEMMs work on.
        live: rows of a buffer that elementwise operations work on.
        token: (live,) int64, token of each.
        scale: (live, 1), combine weight of each.
    """

    def __init__(self, chunk: Chunk, index: Tensor, token: Tensor, scale: Tensor, steps: Tensor):
        self.place, self.live, self.height = chunk.rows, chunk.counts[0], chunk.height
        self._expert = chunk.runs[0][1].start
        self._index, self.token, self.scale = index, token, scale
        self._bounds = steps[: self.height + 1]
        if self.height != self.live:
            self._bounds = self._bounds.clamp(max=self.live)

    def gather(self, source: Tensor) -> Tensor:
        """The rows of the assignments' tokens, zeros in empty rows: (height, width)."""
        return gather(source, self._index, self._bounds)

    def spread(self, rows: Tensor) -> Tensor:
        """Rows of assignments as live rows, zeros in empty ones."""
        return rows

    def collect(self, live: Tensor, out: Tensor) -> None:
        """The other way round."""
        out.copy_(live)

    def clear_rest(self, buffer: Tensor) -> None:
        """Zero what is left out of `live`: it meets zeros in products over rows, and NaN times zero is NaN."""
        if self.height != self.live:
            buffer[self.live : self.height].zero_()

    def through(self, rows: Tensor, w: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        """out = rows @ w[e] + bias[e], w (E, I, O)."""
        rows, out = rows[: self.height], out[: self.height]
        if bias is None:
            torch.mm(rows, w[self._expert], out=out)
        else:
            torch.addmm(bias[self._expert], rows, w[self._expert], out=out)

    def over_rows(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """out[e] = left^T @ right, over the rows of expert e."""
        torch.mm(left[: self.height].t(), right[: self.height], out=out[self._expert])

    def sum_rows(self, rows: Tensor, out: Tensor) -> None:
        """out[e] = sum over the rows of expert e."""
        torch.sum(rows[: self.height], 0, out=out[self._expert])

    def sum_scaled_rows(self, live: Tensor, out: Tensor) -> None:
        """out[e] = sum over the rows of expert e, by their combine weights."""
        torch.mv(live.t(), self.scale[:, 0], out=out[self._expert])

    def add_scaled(self, live: Tensor, bias: Tensor) -> None:
        """live += combine weight * bias[e]."""
        live.addmm_(self.scale, bias[self._expert][None])

    def products(self, live: Tensor, bias: Tensor) -> Tensor:
        """(live,) inner product of each row with bias[e]."""
        return torch.mv(live, bias[self._expert])


class SeveralExperts:
    """A slot of equal height for each expert. See `OneExpert` for what has no word here.

    Attributes:
        live: rows of a buffer, those of GEMMs too.
        token: (live,) int64; an empty row has the token of a neighbour, to which it adds zero.
        scale: (live, 1), zero for empty rows.
    """

    def __init__(self, chunk: Chunk, index: Tensor, token: Tensor, scale: Tensor, steps: Tensor):
        self.place, self.live = chunk.rows, chunk.size
        self._runs, self._slots, self._height = chunk.runs, chunk.slots, chunk.height
        column = steps[: self._height]
        counts = torch.tensor(chunk.counts, device=steps.device, dtype=steps.dtype)[:, None]
        begin = counts.cumsum(0, dtype=steps.dtype) - counts
        bounds = (begin + torch.minimum(column, counts)).flatten()
        self._index, self._bounds = index, torch.cat([bounds, bounds.new_full((1,), index.numel())])
        self._place = (column < counts).flatten().nonzero().flatten()  # of each assignment in the slots
        self.token = token[(begin + torch.minimum(column, counts - 1)).flatten()]
        self.scale = scale.new_zeros(self.live, 1).index_copy_(0, self._place, scale)

    def gather(self, source: Tensor) -> Tensor:
        return gather(source, self._index, self._bounds)

    def spread(self, rows: Tensor) -> Tensor:
        own = torch.arange(rows.shape[0], device=rows.device, dtype=self._bounds.dtype)
        return gather(rows, own, self._bounds)

    def collect(self, live: Tensor, out: Tensor) -> None:
        torch.index_select(live, 0, self._place, out=out)

    def clear_rest(self, buffer: Tensor) -> None:
        """Nothing is left out: empty rows have zeros where it counts."""

    def through(self, rows: Tensor, w: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        rows, out = self._by_slot(rows), self._by_slot(out)
        for run, experts in self._runs:
            if bias is None:
                torch.bmm(rows[run], w[experts], out=out[run])
            else:
                torch.baddbmm(bias[experts][:, None], rows[run], w[experts], out=out[run])

    def over_rows(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        left, right = self._by_slot(left).transpose(1, 2), self._by_slot(right)
        for run, experts in self._runs:
            torch.bmm(left[run], right[run], out=out[experts])

    def sum_rows(self, rows: Tensor, out: Tensor) -> None:
        for run, experts in self._runs:
            torch.sum(self._by_slot(rows)[run], 1, out=out[experts])

    def sum_scaled_rows(self, live: Tensor, out: Tensor) -> None:
        scale, live = self._by_slot(self.scale).transpose(1, 2), self._by_slot(live)
        for run, experts in self._runs:
            torch.bmm(scale[run], live[run], out=out[experts][:, None])

    def add_scaled(self, live: Tensor, bias: Tensor) -> None:
        scale, live = self._by_slot(self.scale), self._by_slot(live)
        for run, experts in self._runs:
            live[run].baddbmm_(scale[run], bias[experts][:, None])

    def products(self, live: Tensor, bias: Tensor) -> Tensor:
        live = self._by_slot(live)
        parts = [torch.bmm(live[run], bias[experts][:, :, None]).flatten() for run, experts in self._runs]
        return torch.cat(parts)

    def _by_slot(self, buffer: Tensor) -> Tensor:
        """Every row of each slot: (slots, height, width)."""
        return buffer[: self.live].view(self._slots, self._height, buffer.shape[1])
