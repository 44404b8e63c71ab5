"""Grouped-query attention with rotary positions, and its key-value cache."""

from __future__ import annotations

from torch import Tensor, nn

from ...kernels.attention import Documents, attention
from .norm import RMSNorm
from .rope import Rotation


class LayerCache:
    """Keys and values of the tokens seen so far, for one layer; memory grows by doubling."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest (B, S, G, W) and return all so far, (B, P, G, W)."""
        start, end = self.length, self.length + k.shape[1]
        self._keys, self._values = self._room(self._keys, k, end), self._room(self._values, v, end)
        self._keys[:, start:end], self._values[:, start:end] = k, v
        self.length = end
        return self._keys[:, :end], self._values[:, :end]

    def _room(self, held: Tensor | None, new: Tensor, needed: int) -> Tensor:
        if held is not None and held.shape[1] >= needed:
            return held
        grown = new.new_empty(new.shape[0], max(needed, 2 * self.length, 64), *new.shape[2:])
        if held is not None:
            grown[:, : self.length] = held[:, : self.length]
        return grown


class KeyValueCache:
    """One `LayerCache` a layer; given to a model's forward pass, which appends to it."""

    def __init__(self, layers: int) -> None:
        self.layers = [LayerCache() for _ in range(layers)]

    @property
    def length(self) -> int:
        """Tokens that every layer has seen."""
        return self.layers[-1].length


class Attention(nn.Module):
    """Causal self-attention with grouped queries (2305.13245) and rotary positions.

    Args:
        width: D.
        heads, kv_heads, head_width: H query heads share G key-value heads of width W.
        qk_norm: RMSNorm of queries and keys: none, head (over each head, as Qwen3), projection (over all heads at once,
            as OLMoE).
        bias: biases on the query, key and value projections.
        window: a token sees itself and the window - 1 tokens before it; None for the whole document.

    Shapes: (B, S, D) -> (B, S, D).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        qk_norm: str = "none",
        bias: bool = False,
        window: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.head_width = head_width
        self.window = window
        query_width, key_width = heads * head_width, kv_heads * head_width
        self.wq = nn.Linear(width, query_width, bias=bias)
        self.wk = nn.Linear(width, key_width, bias=bias)
        self.wv = nn.Linear(width, key_width, bias=bias)
        self.wo = nn.Linear(query_width, width, bias=False)
        self.norms_heads = qk_norm == "head"
        normed = {"none": (), "head": (head_width, head_width), "projection": (query_width, key_width)}[qk_norm]
        self.q_norm, self.k_norm = [RMSNorm(size, norm_eps) for size in normed] or (nn.Identity(), nn.Identity())

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        q, k, v = self.wq(x), self.wk(x), self._heads(self.wv(x))
        if self.norms_heads:
            q, k = self.q_norm(self._heads(q)), self.k_norm(self._heads(k))
        else:
            q, k = self._heads(self.q_norm(q)), self._heads(self.k_norm(k))
        q, k = rotation(q).to(v.dtype), rotation(k).to(v.dtype)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.wo(attention(q, k, v, documents, self.window).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width))
