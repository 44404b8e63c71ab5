"""A transformer block: attention, then a dense MLP or a MoE layer, each added to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..context import StepContext
from ..layer import MoELayer
from ..recompute import checkpointed
from .attention import LayerCache, SelfAttention, Visible
from .norm import RMSNorm
from .rope import Rotation

CHECKPOINTING = ("none", "full", "selective")


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        width: D.
        attention: self-attention.
        mlp: dense MLP or MoE layer.
        norm_eps: of both norms.
        checkpointing: what the backward pass recomputes: none; full, the whole block; selective, the MLP or MoE half
            only, whose activations are the largest.

    Shapes: (B, S, D) -> (B, S, D).
    """

    def __init__(
        self,
        width: int,
        attention: SelfAttention,
        mlp: nn.Module,
        norm_eps: float = 1e-5,
        checkpointing: str = "none",
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(width, norm_eps)
        self.mlp = mlp
        self.checkpointing = checkpointing

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        visible: Visible,
        context: StepContext,
        cache: LayerCache | None = None,
    ) -> Tensor:
        recompute = self.checkpointing if torch.is_grad_enabled() and cache is None else "none"
        if recompute == "full":
            return checkpointed(self._whole, x, rotation, visible, context)
        x = self._attend(x, rotation, visible, cache)
        if recompute == "selective":
            return checkpointed(self._transform, x, context)
        return self._transform(x, context)

    def compile(self, *args: Any, **options: Any) -> None:
        """torch.compile both halves of the block, each on its own: recomputation has to call them from outside."""
        self._attend = torch.compile(self._attend, *args, **options)
        self._transform = torch.compile(self._transform, *args, **options)

    def _whole(self, x: Tensor, rotation: Rotation, visible: Visible, context: StepContext) -> Tensor:
        return self._transform(self._attend(x, rotation, visible, None), context)

    def _attend(self, x: Tensor, rotation: Rotation, visible: Visible, cache: LayerCache | None) -> Tensor:
        return x + self.attention(self.attention_norm(x), rotation, visible, cache)

    def _transform(self, x: Tensor, context: StepContext) -> Tensor:
        hidden = self.mlp_norm(x)
        return x + (self.mlp(hidden, context) if isinstance(self.mlp, MoELayer) else self.mlp(hidden))
