"""Activations of an expert, and their derivatives for kernels that write their own backward.

Gated activations take h (..., 2F), gate half first, and return act(gate) * up. The others take (..., F).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError

GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
PLAIN = ("silu", "gelu", "relu", "relu2")
ACTIVATIONS = (*GATED, *PLAIN)


def check_activation(name: str, field: str = "activation") -> None:
    """Raise ConfigError if there is no activation of this name."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"{field}={name!r} is unknown, allowed: {', '.join(ACTIVATIONS)}")


def is_gated(name: str) -> bool:
    """Whether the first weight matrix holds a gate and an up half."""
    check_activation(name)
    return name in GATED


def activate(name: str, h: Tensor) -> Tensor:
    """Apply an activation, differentiable by autograd: (..., 2F) or (..., F) -> (..., F)."""
    if is_gated(name):
        gate, up = h.chunk(2, dim=-1)
        return _FORWARD[GATED[name]](gate) * up
    return _FORWARD[name](h)


def activate_backward(name: str, h: Tensor, grad: Tensor) -> Tensor:
    """Gradient of `activate` with respect to h.

    Shapes: h (N, 2F) or (N, F), grad (N, F) -> like h.
    """
    if not is_gated(name):
        return _backward(name, h, grad)
    gate, up = h.chunk(2, dim=-1)
    grad_h = torch.empty_like(h)
    grad_gate, grad_up = grad_h.chunk(2, dim=-1)
    torch.mul(grad, _FORWARD[GATED[name]](gate), out=grad_up)
    grad_gate.copy_(_backward(GATED[name], gate, grad * up))
    return grad_h


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "relu2": _relu2}


def _backward(name: str, x: Tensor, grad: Tensor) -> Tensor:
    match name:
        case "silu":
            return torch.ops.aten.silu_backward(grad, x)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, x)
        case "relu":
            return grad * (x > 0)
        case _:
            return grad * F.relu(x) * 2
