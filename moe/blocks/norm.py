"""RMSNorm as a module."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels.rms_norm import rms_norm
from ...parallel.shards import local_part
from ...parallel.tensor.collectives import sum_shares


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension and scale (1910.07467).

    Under autocast the result is already in the autocast dtype, so that the projections that read it share one cast.

    Args:
        width: D.
        group: ranks over which the last dimension is cut, and the weight with it; None for the whole on each rank.

    Shapes: (..., D) -> (..., D), or D / ranks of it.
    """

    def __init__(self, width: int, eps: float = 1e-5, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.group = group
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        out = rms_norm(x, self.weight, self.eps) if self.group is None else self._cut(x, self.group)
        device = x.device.type
        return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out

    def _cut(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = sum_shares(wide.square().sum(-1, keepdim=True), group)
        return (wide * (square / self.width + self.eps).rsqrt() * local_part(self.weight)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"
