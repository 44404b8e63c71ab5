"""Auxiliary losses reach the router's gradient without entering the reported loss."""

from __future__ import annotations

import torch
from torch import Tensor


def inject_gradient(carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Return `carrier` unchanged; in backward, add `scale` times the gradient of `loss`.

    The model's loss of an optimizer step is a sum over target tokens divided by their global number. An auxiliary loss
    is a mean over the T tokens of one forward pass, so its share of the step is T / global tokens: that is `scale`.
    Summed over micro-batches and ranks, it gives the token-weighted mean, whatever the split. The node sits on a tensor
    that the loss depends on, so it survives activation checkpointing and pipeline stages, and nothing needs to be
    returned through the model.

    Args:
        carrier: any tensor on the path to the loss; a small one, since it is copied.
        loss: () auxiliary loss, its coefficient included.
        scale: T / global tokens.
    """
    return _Inject.apply(carrier, loss, scale)


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss_dtype, ctx.loss_device = scale, loss.dtype, loss.device
        return carrier.clone()  # a view would be taken for its base by torch.compile, which then skips this node

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, torch.full((), ctx.scale, dtype=ctx.loss_dtype, device=ctx.loss_device), None
