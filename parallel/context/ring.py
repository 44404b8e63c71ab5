"""Ring attention on GPUs: keys and values travel from rank to rank while each rank computes with those it has.

torch's own (torch.distributed.tensor.experimental, a prototype) with the attention kernel of FlashAttention, in the
order of `parallel.context.zigzag` (Liu et al., 2310.01889). It sends as many bytes as gathering, but holds the keys of
two ranks at a time and not those of all, and overlaps sending with computation. Blocks of the ring know nothing of
documents, windows or sinks, and their keys and values have one width: what asks for more is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels import ConfigError
from ...kernels.untraced import untraced
from ..torch_private import ring_attention
from .attention import ContextAttention

_SEQUENCE = 2  # of (B, H, S, W)


@dataclass(frozen=True, eq=False)
class RingContext(ContextAttention):
    """Attention of this rank's queries to the keys of all ranks, which come by one after the other."""

    group: dist.ProcessGroup

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor | None,
        num_rows: int,
        row_length: int,
        group: dist.ProcessGroup,
        device: torch.device,
        window: int | None = None,
    ) -> RingContext:
        """Raises: ConfigError on a CPU, for packed documents, and for a window shorter than the sequence."""
        reason = None
        if device.type != "cuda":
            reason = f"runs on CUDA only, not on {device.type}"
        elif cu_seqlens is not None and cu_seqlens.numel() != num_rows + 1:
            reason = "cannot keep packed documents apart"
        elif window is not None and window < row_length:
            reason = f"knows no model.sliding_window={window}"
        if reason is not None:
            raise ConfigError(f"trainer.context_attention=ring {reason}, allowed: gather")
        return cls(group)

    @untraced
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        if sinks is not None or q.shape[-1] != v.shape[-1]:
            what = "attention_sinks" if sinks is not None else "latent_attention"
            raise ConfigError(f"trainer.context_attention=ring knows no model.{what}, allowed: gather")
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return _Ring.apply(q, k, v, self.group).transpose(1, 2)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        run, _ = ring_attention()
        out, logsumexp, *random = run(group, _SEQUENCE, _forward, q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, logsumexp, *random)
        ctx.group = group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, logsumexp, *random = ctx.saved_tensors
        _, run = ring_attention()
        operator = partial(_backward, random=random)
        names = "grad_out", q, k, v, out, logsumexp
        grads = run(ctx.group, _SEQUENCE, operator, grad.contiguous(), *names, is_causal=True)
        return *grads[:3], None


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    """Attention of one pair of blocks: output, log-sum-exp (B, H, S), and what the backward operator asks for."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8:
        raise ConfigError(
            f"trainer.context_attention=ring cannot compute {q.dtype} heads of width {q.shape[-1]}, "
            "allowed: trainer.precision=bf16 with model.head_width a multiple of 8, or gather"
        )
    out, logsumexp, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, is_causal, False
    )
    return out, logsumexp, seed, offset


def _backward(
    *,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    random: list[Any],
) -> tuple[Tensor, ...]:
    # Cumulative lengths are for packed sequences; the random state, for dropout, is not read at a rate of zero.
    lengths = (None, None, query.shape[_SEQUENCE], key.shape[_SEQUENCE])
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad_out, query, key, value, out, logsumexp, *lengths, 0.0, is_causal, *random
    )
