"""Attention of the last tokens of each of several documents to all of its tokens so far.

This is what a rank computes when sequences are cut over ranks: it has some queries of a document, and all keys up to
the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .attention import _flex, _Permute, _varlen_call, _varlen_serves
from .sdpa import causal_mask, sdpa, widened


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Lengths of n pieces, whose tokens lie one after the other. Made once per forward pass, used by every layer.

    Attributes:
        queries, keys: tokens of each piece; the queries are those of the last keys, so there are at least as many keys.
        cu_queries, cu_keys: (n + 1,) int32 on the device, cumulative.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    cu_queries: Tensor
    cu_keys: Tensor
    _masks: dict[int | None, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, device: torch.device) -> Prefixes:
        """From (n,) int64 lengths on the CPU."""
        cumulative = (torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (queries, keys))
        cu_queries, cu_keys = (lengths.to(device, non_blocking=True) for lengths in cumulative)
        return cls(tuple(queries.tolist()), tuple(keys.tolist()), cu_queries, cu_keys)

    def runs(self) -> list[tuple[int, int, int]]:
        """(how many, queries, keys) of each run of equal pieces."""
        equal = groupby(zip(self.queries, self.keys))
        return [(len(list(group)), queries, keys) for (queries, keys), group in equal]

    def block_mask(self, window: int | None) -> Any:
        """The FlexAttention mask over all pieces as one row."""
        if window not in self._masks:
            self._masks[window] = _block_mask(self, window)
        return self._masks[window]


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, window: int | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Causal grouped-query attention within each piece.

    Args:
        q: (Tq, H, W) queries of all pieces.
        k, v: (Tk, G, W) and (Tk, G, V), H divisible by G, V at most W.
        window: a token sees itself and the window - 1 tokens before it; None for all before it.
        sinks: (H,) a logit of each head that takes part in its softmax and brings no value; None for none.

    Returns: (Tq, H, V).
    """
    if v.shape[-1] < q.shape[-1]:
        return prefix_attention(q, k, widened(v, q.shape[-1]), prefixes, window, sinks)[..., : v.shape[-1]]
    if not q.is_cuda:
        return _piece_by_piece(q, k, v, prefixes, window, sinks)
    if sinks is None and q.dtype in (torch.bfloat16, torch.float16) and _varlen_serves(window):
        longest = max(prefixes.queries, default=0), max(prefixes.keys, default=0)
        return _varlen_call(q, k, v, (prefixes.cu_queries, prefixes.cu_keys), longest, window)
    return _flex(q, k, v, prefixes.block_mask(window), sinks)


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order], with the inverse permutation for its backward."""
    return _Permute.apply(x, order, inverse)


def _piece_by_piece(
    q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes, window: int | None, sinks: Tensor | None
) -> Tensor:
    runs = prefixes.runs()
    query_sizes = [count * queries for count, queries, _ in runs]
    key_sizes = [count * keys for count, _, keys in runs]
    out = []
    for (count, queries, keys), q_run, k_run, v_run in zip(
        runs, q.split(query_sizes), k.split(key_sizes), v.split(key_sizes)
    ):
        q_run = q_run.unflatten(0, (count, queries))
        k_run, v_run = k_run.unflatten(0, (count, keys)), v_run.unflatten(0, (count, keys))
        hidden_by_window = window is not None and window < keys
        if queries == keys and not hidden_by_window:
            out_run = sdpa(q_run, k_run, v_run, is_causal=True, sinks=sinks)
        else:
            mask = causal_mask(queries, keys, window if hidden_by_window else None, q.device)
            out_run = sdpa(q_run, k_run, v_run, mask=mask, sinks=sinks)
        out.append(out_run.flatten(0, 1))
    return torch.cat(out)


def _block_mask(prefixes: Prefixes, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    num_queries, num_keys = sum(prefixes.queries), sum(prefixes.keys)
    device = prefixes.cu_keys.device
    query_piece, key_piece = (
        torch.searchsorted(ends[1:].contiguous(), torch.arange(size, device=device, dtype=torch.int32), right=True)
        for ends, size in ((prefixes.cu_queries, num_queries), (prefixes.cu_keys, num_keys))
    )
    # A query's own key: as far from the end of the piece's keys as the query is from the end of its queries.
    offset = (prefixes.cu_keys - prefixes.cu_queries)[1:][query_piece]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = query + offset[query]
        seen = (query_piece[query] == key_piece[key]) & (own >= key)
        return seen if window is None else seen & (own - key < window)

    return create_block_mask(sees, None, None, num_queries, num_keys, device=str(device))
