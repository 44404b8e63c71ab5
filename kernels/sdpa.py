"""Attention by torch's `scaled_dot_product_attention`, with the sequence before the heads and with attention sinks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def widened(v: Tensor, width: int) -> Tensor:
    """Values with zeros behind them: the fast kernels take keys and values of one width."""
    return F.pad(v, (0, width - v.shape[-1]))


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """(B, S, H, W), (B, P, G, W) -> (B, S, H, W).

    Args:
        mask: (S, P) bool, True where a query sees a key.
        sinks: (H,) a logit of each head that takes part in its softmax and brings no value.
        scale: on the products of queries and keys; None for 1 / sqrt(W).
    """
    if sinks is not None:
        return _with_sinks(q, k, v, mask, is_causal, sinks)
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.is_cuda and q.dtype == torch.float32:  # only the kernels for half precision know groups there
        k, v, grouped = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2]), False
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped, **options)
    return out.transpose(1, 2)


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, sinks: Tensor) -> Tensor:
    """A sink is a token before the first, which every query sees and whose value is zero.

    Its logit depends on the query head, of which several may share a key: so the logit is one more channel of the
    queries, in which that token's key is one and all others are zero. Under a causal mask it has a query too.
    """
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    more = 8 if q.is_cuda else 1  # channels: there the fast kernels want multiples of 8
    logit = (sinks / scale).to(q.dtype)[:, None].expand(*q.shape[:-1], 1)
    q = F.pad(torch.cat((q, logit), -1), (0, more - 1, 0, 0, int(is_causal), 0))
    k, v = F.pad(k, (0, more, 0, 0, 1, 0)), F.pad(v, (0, more, 0, 0, 1, 0))
    k[:, 0, :, width] = 1.0
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True)
    return sdpa(q, k, v, mask, is_causal, scale=scale)[:, int(is_causal) :, :, :width]


def with_past(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """Causal attention of the newest S tokens, (B, S, H, W), to all P: (B, P, G, W)."""
    new, total = q.shape[1], k.shape[1]
    if new == 1:
        if window is not None:
            k, v = k[:, -window:], v[:, -window:]
        return sdpa(q, k, v, sinks=sinks)
    return sdpa(q, k, v, mask=causal_mask(new, total, window, q.device), sinks=sinks)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool, True where a query sees a key; the last query is at the last key."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    seen = query >= key
    return seen if window is None else seen & (query - key < window)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(..., G, W) -> (..., H, W), each key-value head once for each of its query heads."""
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)
