"""A numeric check of the kernels on the device at hand: compilers have bugs that no test elsewhere can see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import is_gated
from ..reference import moe_mlp_reference
from ..routing import Routing
from .ops import moe_mlp_triton

_ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_NAMES = ("output", "gradient of x", "gradient of w_in", "gradient of w_out", "gradient of the combine weights")


@dataclass(frozen=True)
class Check:
    """One compared tensor: its error in norm over its norm, and what rounding explains."""

    name: str
    dtype: torch.dtype
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def self_check(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int = 600,
    width: int = 320,
    expert_width: int = 192,
    experts: int = 6,
    activation: str = "swiglu",
) -> list[Check]:
    """Compare output and gradients of the Triton kernels with float64 on the same rounded inputs."""
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * expert_width if is_gated(activation) else expert_width

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    token, expert = (torch.rand(tokens, experts, generator=generator) < 0.4).nonzero(as_tuple=True)
    weight = torch.rand(token.numel(), generator=generator)
    token, expert, weight = (t.to(device) for t in (token, expert, weight))
    routing = Routing.from_assignments(token, expert, weight, tokens, experts)
    x, grad = randn(tokens, width), randn(tokens, width)
    w_in, w_out = randn(experts, hidden, width, scale=width**-0.5), randn(experts, width, expert_width, scale=0.1)

    def run(function, to: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(to).requires_grad_() for t in (x, w_in, w_out)]
        leaves.append(routing.weight.detach().to(torch.promote_types(to, torch.float32)).requires_grad_())
        out = function(*leaves[:3], routing.with_weight(leaves[3]), activation)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))]

    allowed = 6 * _ROUNDING[dtype]  # at most six values between inputs and result are rounded to the dtype
    pairs = zip(_NAMES, run(moe_mlp_triton, dtype), run(moe_mlp_reference, torch.float64))
    return [Check(n, dtype, float((a.double() - b).norm() / b.norm()), allowed) for n, a, b in pairs]
