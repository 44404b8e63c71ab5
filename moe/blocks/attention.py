"""Self-attention with rotary positions, grouped-query attention as the usual form of it, and its key-value cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.attention import Documents, attention
from ...parallel.context.attention import ContextAttention
from ...parallel.shards import local_part
from ...parallel.tensor.collectives import gather_sequence, scatter_sequence
from .linear import Linear
from .norm import RMSNorm
from .rope import Rotation

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

# What a token may see: the documents of whole sequences (None: one a row), or how to reach what other ranks hold.
Visible: TypeAlias = Documents | ContextAttention | None


class LayerCache:
    """Keys and values of the tokens seen so far, for one layer; memory grows by doubling.

    Latent attention keeps its latents here in the place of keys and values.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest (B, S, …) and return all so far, (B, P, …)."""
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


class SelfAttention(nn.Module, ABC):
    """What every kind has in common: causal, its window, and a projection `wo` of all heads' outputs.

    Shapes: (B, S, D) -> (B, S, D), S cut over context and tensor parallel ranks.
    """

    wo: Linear

    def __init__(self, window: int | None, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.window = window
        self.group = group

    @abstractmethod
    def forward(
        self, x: Tensor, rotation: Rotation, visible: Visible = None, cache: LayerCache | None = None
    ) -> Tensor: ...

    @abstractmethod
    def tensor_styles(self) -> dict[str, ParallelStyle]:
        """How tensor parallelism cuts it, by module name ("" for its own parameters): over the heads."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible, sinks: Tensor | None = None) -> Tensor:
        """(B, S, H, W), (B, P, G, W), (B, P, G, V) -> (B, S, H, V) over the tokens that are visible."""
        if isinstance(visible, ContextAttention):
            return visible(q, k, v, sinks)
        return attention(q, k, v, visible, self.window, sinks)

    def project(self, out: Tensor) -> Tensor:
        """(B, S, H, V) -> (B, S / TP, D). The bias is added once, after the sum over tp ranks."""
        out = out.flatten(-2)
        if self.group is None:
            return self.wo(out)
        summed = scatter_sequence(F.linear(out, local_part(self.wo.weight)), self.group)
        return summed if self.wo.bias is None else summed + self.wo.bias.to(summed.dtype)


class Attention(SelfAttention):
    """Grouped-query attention (2305.13245) with rotary positions.

    Args:
        width: D.
        heads, kv_heads, head_width: H query heads share G key-value heads of width W.
        qk_norm: RMSNorm of queries and keys: none, head (over each head, as Qwen3), projection (over all heads at once,
            as OLMoE).
        bias: biases on the query, key and value projections.
        output_bias: one on the output projection.
        sinks: each head learns a logit that takes part in its softmax and brings no value, so that a head may attend
            to nothing (GPT-OSS; 2309.17453).
        window: a token sees itself and the window - 1 tokens before it; None for the whole document.
        group: tp ranks over which the heads are cut; None for all of them here.

    Parameters: wq, wk, wv, wo; q_norm, k_norm; sinks (H,).
    Shapes: (B, S, D) -> (B, S, D), S cut over context and tensor parallel ranks.
    """

    sinks: nn.Parameter | None

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
        group: dist.ProcessGroup | None = None,
        output_bias: bool = False,
        sinks: bool = False,
    ) -> None:
        super().__init__(window, group)
        self.head_width = head_width
        self.qk_norm = qk_norm
        query_width, key_width = heads * head_width, kv_heads * head_width
        self.wq = Linear(width, query_width, bias=bias)
        self.wk = Linear(width, key_width, bias=bias)
        self.wv = Linear(width, key_width, bias=bias)
        self.wo = Linear(query_width, width, bias=output_bias)
        normed = {"none": (), "head": (head_width, head_width), "projection": (query_width, key_width)}[qk_norm]
        norm_group = group if qk_norm == "projection" else None
        norms = [RMSNorm(size, norm_eps, norm_group) for size in normed]
        self.q_norm, self.k_norm = norms or (nn.Identity(), nn.Identity())
        self.register_parameter("sinks", nn.Parameter(torch.zeros(heads)) if sinks else None)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        visible: Visible = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x = gather_sequence(x, self.group)
        q, k, v = self.wq(x), self.wk(x), self._heads(self.wv(x))
        if self.qk_norm == "head":
            q, k = self.q_norm(self._heads(q)), self.k_norm(self._heads(k))
        else:
            q, k = self._heads(self.q_norm(q)), self._heads(self.k_norm(k))
        q, k = rotation(q).to(v.dtype), rotation(k).to(v.dtype)
        if cache is not None:
            k, v = cache.append(k, v)
        sinks = None if self.sinks is None else local_part(self.sinks)
        return self.project(self.attend(q, k, v, visible, sinks))

    def tensor_styles(self) -> dict[str, ParallelStyle]:
        from ...parallel.tensor.styles import CutParameters, cut_inputs, cut_outputs

        styles = {"wq": cut_outputs(), "wk": cut_outputs(), "wv": cut_outputs(), "wo": cut_inputs()}
        if self.sinks is not None:
            styles[""] = CutParameters(sinks=0)
        if self.qk_norm == "projection":
            styles |= {name: CutParameters(weight=0) for name in ("q_norm", "k_norm")}
        return styles

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width))
