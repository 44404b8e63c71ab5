"""Activations of an expert, and their derivatives for kernels that write their own backward.

Gated activations take h (..., 2F), gate half first, and return act(gate) * up. The others take (..., F).

clamped_swiglu is that of GPT-OSS: g = min(gate, 7), u = clamp(up, -7, 7), result g * sigmoid(1.702 g) * (u + 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError

CLAMPED = "clamped_swish"  # where it is the gate's activation, up is clamped too, and one added to it
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "clamped_swiglu": CLAMPED}
PLAIN = ("silu", "gelu", "relu", "relu2")
ACTIVATIONS = (*GATED, *PLAIN)
CLAMPED_ALPHA, CLAMPED_LIMIT = 1.702, 7.0


def check_activation(name: str, field: str = "activation") -> None:
    """Raise ConfigError if there is no activation of this name."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"{field}={name!r} is unknown, allowed: {', '.join(ACTIVATIONS)}")


def is_gated(name: str) -> bool:
    """Whether the first weight matrix holds a gate and an up half."""
    check_activation(name)
    return name in GATED


def activate(name: str, h: Tensor, up: Tensor | None = None) -> Tensor:
    """Apply an activation, differentiable by autograd: (..., 2F) or (..., F) -> (..., F).

    Args:
        up: the up half of a gated activation, where h is only the gate half.
    """
    if not is_gated(name):
        return _FORWARD[name](h)
    gate, up = h.chunk(2, dim=-1) if up is None else (h, up)
    return _FORWARD[GATED[name]](gate) * (_shifted(up) if GATED[name] == CLAMPED else up)


def activate_out(name: str, h: Tensor, out: Tensor, inner: Tensor) -> None:
    """`activate` into a buffer, without a graph and without temporaries.

    Args:
        h: (N, 2F) or (N, F).
        out: (N, F), receives the result.
        inner: (N, F), receives act(gate) of a gated activation, which `activate_backward_out` needs; may be `out`
            itself where no backward follows. Left alone by the others.
    """
    if is_gated(name):
        gate, up = h.chunk(2, dim=-1)
        _FORWARD_OUT[GATED[name]](gate, inner)
        torch.mul(inner, _shifted(up) if GATED[name] == CLAMPED else up, out=out)
    else:
        _FORWARD_OUT[name](h, out)


def activate_backward_out(name: str, h: Tensor, grad: Tensor, grad_h: Tensor) -> None:
    """Gradient of `activate` with respect to h, into a buffer. Overwrites `grad`.

    Args:
        h: (N, 2F) or (N, F).
        grad: (N, F), gradient of the result.
        grad_h: like h, receives the gradient. For a gated activation its second half holds act(gate) before: it was
            the `inner` of `activate_out`.
    """
    if is_gated(name):
        gate, up = h.chunk(2, dim=-1)
        grad_gate, grad_up = grad_h.chunk(2, dim=-1)
        grad_up.mul_(grad)
        if GATED[name] == CLAMPED:
            grad_up.masked_fill_(up.abs() > CLAMPED_LIMIT, 0.0)
            up = _shifted(up)
        _BACKWARD_OUT[GATED[name]](grad.mul_(up), gate, grad_gate)
    else:
        _BACKWARD_OUT[name](grad, h, grad_h)


def _shifted(up: Tensor) -> Tensor:
    """What a clamped gate is multiplied by."""
    return up.clamp(-CLAMPED_LIMIT, CLAMPED_LIMIT) + 1


def _clamped_swish(x: Tensor) -> Tensor:
    x = x.clamp(max=CLAMPED_LIMIT)
    return x * torch.sigmoid(CLAMPED_ALPHA * x)


def _clamped_swish_out(x: Tensor, out: Tensor) -> None:
    torch.clamp_max(x, CLAMPED_LIMIT, out=out)
    out.mul_((CLAMPED_ALPHA * out).sigmoid_())


def _clamped_swish_backward_out(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.mul(x, CLAMPED_ALPHA, out=out)
    sigmoid = out.sigmoid()
    out.mul_(1 - sigmoid).add_(1).mul_(sigmoid).mul_(grad).masked_fill_(x > CLAMPED_LIMIT, 0.0)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _relu2_out(x: Tensor, out: Tensor) -> None:
    torch.clamp_min(x, 0, out=out)
    out.mul_(out)


def _relu2_backward_out(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.clamp_min(x, 0, out=out)
    out.mul_(grad).mul_(2)


_aten = torch.ops.aten
_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": _relu2,
    CLAMPED: _clamped_swish,
}
_FORWARD_OUT: dict[str, Callable[[Tensor, Tensor], object]] = {
    "silu": lambda x, out: _aten.silu.out(x, out=out),
    "gelu": lambda x, out: _aten.gelu.out(x, out=out),
    "relu": lambda x, out: torch.clamp_min(x, 0, out=out),
    "relu2": _relu2_out,
    CLAMPED: _clamped_swish_out,
}
_BACKWARD_OUT: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "silu": lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out),
    "gelu": lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, grad_input=out),
    "relu": lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    "relu2": _relu2_backward_out,
    CLAMPED: _clamped_swish_backward_out,
}
