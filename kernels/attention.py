"""Causal attention over packed documents: one function, and the backend that fits device and dtype.

Tokens of several documents may lie in one row; cumulative lengths say where each document starts. A dense mask would
spend time and memory on pairs that do not see each other, so:

- one document a row: plain causal `scaled_dot_product_attention`;
- CPU: one call for each run of documents of equal length, 5 to 7 times faster than a mask;
- CUDA in bf16 or fp16: `torch.nn.attention.varlen.varlen_attn`;
- CUDA otherwise: FlexAttention, whose block mask is made once per forward pass and shared by all layers.

Attention sinks (one logit a head in the denominator of the softmax, GPT-OSS) are a token before the first one where
`scaled_dot_product_attention` runs, and a factor on the output of FlexAttention elsewhere.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .sdpa import causal_mask, repeat_heads, sdpa, widened, with_past
from .untraced import untraced

varlen_attn: Any = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    _VARLEN_KEYWORDS = frozenset()  # a build of torch without it
else:
    _VARLEN_KEYWORDS = frozenset(inspect.signature(varlen_attn).parameters)


@dataclass(frozen=True, eq=False)
class Documents:
    """Where documents start and end in a batch of packed rows. Made once per forward pass, used by every layer.

    Attributes:
        cu_seqlens: (n + 1,) int32, cumulative lengths over the flattened B * S tokens, from 0 to B * S, with a boundary
            at each row start; empty documents are allowed.
        num_rows, row_length: B and S; no document exceeds S.
    """

    cu_seqlens: Tensor
    num_rows: int
    row_length: int
    _masks: dict[int | None, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, cu_seqlens: Tensor | None, num_rows: int, row_length: int, device: torch.device) -> Documents | None:
        """The documents of a (num_rows, row_length) batch; None where every row is one document."""
        if cu_seqlens is None or cu_seqlens.numel() == num_rows + 1:
            return None
        if not cu_seqlens.is_cuda and int(cu_seqlens[-1]) != num_rows * row_length:
            raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, the batch has {num_rows * row_length} tokens")
        return cls(cu_seqlens.to(device, torch.int32, non_blocking=True), num_rows, row_length)

    @classmethod
    def rows(cls, num_rows: int, row_length: int, device: torch.device) -> Documents:
        """One document a row."""
        starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device) * row_length
        return cls(starts, num_rows, row_length)

    @cached_property
    def plan(self) -> _Plan:
        """How to cut the tokens into calls; for documents on the CPU."""
        return _Plan.of(self.cu_seqlens.diff().long())

    def block_mask(self, window: int | None) -> Any:
        """The FlexAttention mask over all tokens as one row."""
        if window not in self._masks:
            self._masks[window] = _block_mask(self.cu_seqlens, self.num_rows * self.row_length, window)
        return self._masks[window]


def _block_mask(cu_seqlens: Tensor, num_tokens: int, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    position = torch.arange(num_tokens, device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (document[query] == document[key]) & (query >= key)
        return seen if window is None else seen & (query - key < window)

    return create_block_mask(sees, None, None, num_tokens, num_tokens, device=str(cu_seqlens.device))


@dataclass(frozen=True)
class _Plan:
    """Runs of documents of equal length, each one batch for attention.

    Attributes:
        runs: (number of documents, their length) of each run, in the order of tokens.
        order, restore: permutations of the tokens into that order and back; None if it is the given order.
    """

    runs: list[tuple[int, int]]
    order: Tensor | None = None
    restore: Tensor | None = None

    @classmethod
    def of(cls, lengths: Tensor) -> _Plan:
        given = _runs(lengths.tolist())
        by_length = lengths.argsort(stable=True)
        merged = _runs(lengths[by_length].tolist())
        if len(merged) > len(given) // 2:  # a permutation copies q, k, v and the output: only for many fewer calls
            return cls(given)
        starts = lengths.cumsum(0) - lengths
        total = int(lengths.sum())
        length = lengths[by_length]
        within = torch.arange(total) - (length.cumsum(0) - length).repeat_interleave(length)
        order = starts[by_length].repeat_interleave(length) + within
        restore = torch.empty_like(order).index_copy_(0, order, torch.arange(total))
        return cls(merged, order, restore)


def _runs(lengths: list[int]) -> list[tuple[int, int]]:
    return [(len(list(group)), length) for length, group in groupby(lengths) if length > 0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | Documents | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention in which packed documents do not see each other.

    Args:
        q: (B, S, H, W) queries.
        k: (B, P, G, W), H divisible by G. P > S means that the first P - S positions are past tokens (a key-value
            cache) and the queries are the newest S; then there is one document a row.
        v: (B, P, G, V), V at most W.
        cu_seqlens: where documents start, as described at `Documents`; None for one document a row.
        window: a token sees itself and the window - 1 tokens before it; None for all before it.
        sinks: (H,) a logit of each head that takes part in its softmax and brings no value; None for none.

    Returns: (B, S, H, V).
    """
    rows, length = q.shape[:2]
    if v.shape[-1] < q.shape[-1]:
        return attention(q, k, widened(v, q.shape[-1]), cu_seqlens, window, sinks)[..., : v.shape[-1]]
    if k.shape[1] != length:
        return with_past(q, k, v, window, sinks)
    documents = cu_seqlens
    if not isinstance(documents, Documents):
        documents = Documents.of(documents, rows, length, q.device)
    if window is not None and window >= length:
        window = None
    if documents is None:
        if window is None:
            return sdpa(q, k, v, is_causal=True, sinks=sinks)
        documents = Documents.rows(rows, length, q.device)
    shape = q.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if not q.is_cuda:
        out = _document_by_document(q, k, v, documents, window, sinks)
    elif sinks is None and q.dtype in (torch.bfloat16, torch.float16) and _varlen_serves(window):
        out = _varlen(q, k, v, documents, window)
    else:
        out = _flex(q, k, v, documents.block_mask(window), sinks)
    return out.view(shape)


@untraced  # every batch has other lengths: a trace would be made anew each time
def _document_by_document(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, sinks: Tensor | None
) -> Tensor:
    """(T, H, W), (T, G, W) -> (T, H, W) by one call for each run of documents of equal length."""
    plan = documents.plan
    if plan.order is not None:
        q, k, v = (_Permute.apply(x, plan.order, plan.restore) for x in (q, k, v))
    sizes = [count * length for count, length in plan.runs]
    out = []
    for (count, length), *run in zip(plan.runs, q.split(sizes), k.split(sizes), v.split(sizes)):
        q_run, k_run, v_run = (x.unflatten(0, (count, length)) for x in run)
        if window is None or window >= length:
            out_run = sdpa(q_run, k_run, v_run, is_causal=True, sinks=sinks)
        else:
            mask = causal_mask(length, length, window, q.device)
            out_run = sdpa(q_run, k_run, v_run, mask=mask, sinks=sinks)
        out.append(out_run.flatten(0, 1))
    joined = torch.cat(out)
    return joined if plan.order is None else _Permute.apply(joined, plan.restore, plan.order)


class _Permute(torch.autograd.Function):
    """x[order]; its backward is the inverse permutation, a gather instead of a slow scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def _varlen_serves(window: int | None) -> bool:
    """Whether this torch's varlen_attn can be causal, and windowed if need be (2.13 has no is_causal argument)."""
    return "window_size" in _VARLEN_KEYWORDS or (window is None and "is_causal" in _VARLEN_KEYWORDS)


def _varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """(T, H, W), (T, G, W) -> (T, H, W). The row length bounds every document, so nothing waits for the device."""
    cu_seqlens, longest = documents.cu_seqlens, documents.row_length
    return _varlen_call(q, k, v, (cu_seqlens, cu_seqlens), (longest, longest), window)


def _varlen_call(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor], longest: tuple[int, int], window: int | None
) -> Tensor:
    """Where a document has fewer queries than keys, they are its last ones (FlashAttention from 2.1 on)."""
    options: dict[str, Any] = {}
    if "window_size" in _VARLEN_KEYWORDS:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _VARLEN_KEYWORDS:
            options["enable_gqa"] = True
        else:
            k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return varlen_attn(q, k, v, *cu_seqlens, *longest, **options)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@untraced
def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, sinks: Tensor | None = None) -> Tensor:
    """(T, H, W), (P, G, W) -> (T, H, W), all tokens as one row under a block mask.

    A sink s scales the output of its head: exp(lse) / (exp(lse) + exp(s)) of each query's log-sum-exp.
    """
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    options: dict[str, Any] = {"block_mask": block_mask, "enable_gqa": q.shape[1] != k.shape[1]}
    if sinks is None:
        return _compiled_flex()(q, k, v, **options).squeeze(0).transpose(0, 1)
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = _compiled_flex()(q, k, v, **options, return_aux=AuxRequest(lse=True))
    out = out * torch.sigmoid(aux.lse - sinks[:, None].to(aux.lse.dtype)).unsqueeze(-1).to(out.dtype)
    return out.squeeze(0).transpose(0, 1)
