"""Attention over the keys of all ranks before a query, gathered once a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.prefix_attention import Prefixes, permute, prefix_attention
from ...kernels.untraced import untraced
from ..tensor.collectives import gather_rows


class ContextAttention(ABC):
    """Causal attention of this rank's queries to the keys of all ranks; made once per pass, used by every layer."""

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """(B, S / CP, H, W), (B, S / CP, G, W), (B, S / CP, G, V), sinks (H,) -> (B, S / CP, H, V)."""


@dataclass(frozen=True, eq=False)
class GatheredContext(ContextAttention):
    """Keys and values of all ranks are gathered once a layer. Exact with documents and windows, on every device.

    A query chunk needs the keys before its end, of its own document only. So each pair of a chunk and a document that
    it touches is one piece, whose queries are the last of its keys; `prefix_attention` computes the pieces.

    Attributes:
        group: the cp ranks.
        prefixes: lengths of the pieces.
        query, restore: permutation of this rank's B * S / CP tokens into pieces, and back; None for the given order.
        key: (Tk,) where each key of the pieces lies among the gathered ones.
        window: a token sees itself and the window - 1 tokens before it; None for all before it.
    """

    group: dist.ProcessGroup
    prefixes: Prefixes
    query: Tensor | None
    restore: Tensor | None
    key: Tensor
    window: int | None

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor | None,
        num_rows: int,
        row_length: int,
        group: dist.ProcessGroup,
        device: torch.device,
        window: int | None = None,
    ) -> GatheredContext:
        """Plan the attention of a batch of `num_rows` whole sequences.

        Args:
            cu_seqlens: (n + 1,) on the CPU, document boundaries of the whole sequences, as at `Documents`; None for one
                document a row.
        """
        cp, rank = dist.get_world_size(group), dist.get_rank(group)
        boundaries = torch.arange(num_rows + 1) * row_length if cu_seqlens is None else cu_seqlens.cpu().long()
        if int(boundaries[-1]) != num_rows * row_length:
            raise ValueError(f"cu_seqlens ends at {int(boundaries[-1])}, the batch has {num_rows * row_length} tokens")
        place = _Places(cp, num_rows, row_length)
        start, queries, keys = _pieces(boundaries, place, rank, window)
        if device.type == "cpu":  # there each run of equal lengths is one call
            order = (queries * (row_length + 1) + keys).argsort(stable=True)
            start, queries, keys = start[order], queries[order], keys[order]
        query = place.local(_ranges(start, queries))
        identity = torch.arange(query.numel())
        restore = None
        if torch.equal(query, identity):
            query = None
        else:
            restore = torch.empty_like(query).index_copy_(0, query, identity)
        key = place.gathered(_ranges(start + queries - keys, keys))
        moved = (None if t is None else t.to(device, non_blocking=True) for t in (query, restore, key))
        return cls(group, Prefixes.of(queries, keys, device), *moved, window)  # type: ignore[arg-type]

    @untraced
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        gathered = gather_rows(torch.cat((k, v), -1), self.group)  # one message
        both = gathered.flatten(0, 1).index_select(0, self.key)
        keys, values = both.split((k.shape[-1], v.shape[-1]), -1)
        queries, shape = q.flatten(0, 1), (*q.shape[:-1], v.shape[-1])
        if self.query is None:
            return prefix_attention(queries, keys, values, self.prefixes, self.window, sinks).view(shape)
        assert self.restore is not None
        queries = permute(queries, self.query, self.restore)
        out = prefix_attention(queries, keys, values, self.prefixes, self.window, sinks)
        return permute(out, self.restore, self.query).view(shape)


def _ring(*args: Any) -> ContextAttention:
    from .ring import RingContext

    return RingContext.of(*args)


# trainer.context_attention: what makes the attention of a pass, with the arguments of `GatheredContext.of`.
CONTEXT_ATTENTION: dict[str, Callable[..., ContextAttention]] = {"gather": GatheredContext.of, "ring": _ring}


@dataclass(frozen=True)
class _Places:
    """Where tokens, numbered in sequence order over B rows of S, lie on the ranks."""

    cp: int
    num_rows: int
    row_length: int

    @property
    def chunk(self) -> int:
        return self.row_length // (2 * self.cp)

    def local(self, token: Tensor) -> Tensor:
        """Index among the B * S / CP tokens of the rank that holds it."""
        row, position = token // self.row_length, token % self.row_length
        half = (position // self.chunk >= self.cp).long()
        return (2 * row + half) * self.chunk + position % self.chunk

    def gathered(self, token: Tensor) -> Tensor:
        """Index among the tokens of all ranks, one rank after the other."""
        chunk = token % self.row_length // self.chunk
        rank = torch.minimum(chunk, 2 * self.cp - 1 - chunk)
        return rank * (self.num_rows * 2 * self.chunk) + self.local(token)


def _pieces(boundaries: Tensor, place: _Places, rank: int, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """First query token, number of queries and number of keys of each piece, in the order of tokens."""
    start, end = boundaries[:-1, None], boundaries[1:, None]
    row = start // place.row_length * place.row_length
    chunk = row + torch.tensor([rank, 2 * place.cp - 1 - rank]) * place.chunk  # first tokens, (documents, 2)
    first, last = torch.maximum(start, chunk), torch.minimum(end, chunk + place.chunk)
    first_key = start.expand_as(first)
    if window is not None:
        first_key = torch.maximum(first_key, first - (window - 1))
    touched = first < last
    first, last, first_key = first[touched], last[touched], first_key[touched]
    order = first.argsort()
    return first[order], (last - first)[order], (last - first_key)[order]


def _ranges(start: Tensor, length: Tensor) -> Tensor:
    """start[0], start[0] + 1, … length[0] numbers, then those of start[1], and so on."""
    end = length.cumsum(0)
    return torch.arange(int(length.sum())) + (start - end + length).repeat_interleave(length)
