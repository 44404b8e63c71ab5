"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension and scale (1910.07467).

    Under autocast the result is already in the autocast dtype, so that the projections that read it share one cast.

    Shapes: (..., D) -> (..., D).
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        out = rms_norm(x, self.weight, self.eps)
        device = x.device.type
        return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
