"""The two passes of `moe_mlp_cpu`.

Saved for backward: x, the pre-activation z (N, 2F) and the routing tables. The gradient of a combine weight is the
inner product of the activation and its un-weighted gradient, so neither expert outputs nor their gradients are kept.
Sums by token run in a fixed order, in float32 for half precision.
"""

from __future__ import annotations

from torch import Tensor

from ..fused_operator import ExpertLayer, fused_operator
from .by_chunks import ByChunks


def forward_pass(layer: ExpertLayer, save_z: bool) -> tuple[Tensor, Tensor]:
    """Gather, GEMM, activation, GEMM, sum by token. See `fused_operator`."""
    return ByChunks(layer).forward(save_z)


def backward_pass(layer: ExpertLayer, grad: Tensor, z: Tensor, needs: list[bool]) -> list[Tensor]:
    """The gradients, gathered rows gathered again. See `fused_operator`."""
    return ByChunks(layer).backward(grad, z, needs)


moe_mlp_cpu = fused_operator("moe_mlp_cpu", forward_pass, backward_pass)
