"""`moe_mlp`: the sum over (token, expert) of weight * expert(x), by the backend that fits."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import check_activation, is_gated
from .backends import BACKENDS, check_serves, choose_backend
from .errors import ConfigError
from .fused_operator import check_recompute
from .routing import Routing


def moe_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    activation: str = "swiglu",
    backend: str | None = None,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    recompute: str = "none",
) -> Tensor:
    """Run every token through its experts and sum the outputs by the combine weights.

    No padding, and no permuted copy of the tokens is kept. Differentiable in x, w_in, w_out, the biases and
    routing.weight. Under autocast, x, the weights and the biases are cast to the autocast dtype.

    Args:
        x: (T, D).
        w_in: (E, 2F, D) for gated activations, gate rows first; (E, F, D) otherwise.
        w_out: (E, D, F).
        routing: over T tokens and E experts, with any number of experts per token.
        activation: one of `kernels.ACTIVATIONS`.
        backend: one of `kernels.BACKENDS`; None for the fastest that runs here.
        b_in: (E, 2F), gate part first, or (E, F); added before the activation. None for none.
        b_out: (E, D), added to the expert's output before its combine weight. None for none.
        recompute: what the backward pass computes again instead of keeping it: none; all, the pre-activation, which
            leaves x and the routing tables to be kept.

    Returns: (T, D); rows that no expert takes are zero.
    Raises: ConfigError for an unknown name, a backend that cannot run here, or shapes or dtypes that do not fit.
    """
    check_activation(activation)
    check_recompute(recompute)
    _check_shapes(x, w_in, w_out, routing, activation, b_in, b_out)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
        b_in, b_out = (None if bias is None else bias.to(dtype) for bias in (b_in, b_out))
    _check_dtypes(x, w_in, w_out, b_in, b_out)
    name = check_backend(backend) or choose_backend(x.device, x.dtype, *w_out.shape[1:]).backend
    check_serves(name, x)
    run = BACKENDS[name]
    with torch.autocast(x.device.type, enabled=False):
        return run(x, w_in, w_out, routing, activation, b_in, b_out, recompute)


def check_backend(name: str | None) -> str | None:
    """The name itself; ConfigError if there is no such backend."""
    if name is not None and name not in BACKENDS:
        raise ConfigError(f"experts.backend={name!r} is unknown, allowed: null, {', '.join(BACKENDS)}")
    return name


def _check_shapes(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    activation: str,
    b_in: Tensor | None,
    b_out: Tensor | None,
) -> None:
    if w_out.dim() != 3:
        raise ConfigError(f"w_out has shape {tuple(w_out.shape)}, allowed: (E, D, F)")
    num_experts, width, expert_width = w_out.shape
    rows = 2 * expert_width if is_gated(activation) else expert_width
    if tuple(w_in.shape) != (num_experts, rows, width):
        raise ConfigError(f"w_in has shape {tuple(w_in.shape)}, {activation} needs {(num_experts, rows, width)}")
    for name, bias, needed in (("b_in", b_in, (num_experts, rows)), ("b_out", b_out, (num_experts, width))):
        if bias is not None and tuple(bias.shape) != needed:
            raise ConfigError(f"{name} has shape {tuple(bias.shape)}, w_in and w_out need {needed}")
    if tuple(x.shape) != (routing.num_tokens, width):
        raise ConfigError(f"x has shape {tuple(x.shape)}, routing and w_out need {(routing.num_tokens, width)}")
    if routing.num_experts != num_experts:
        raise ConfigError(f"routing is over {routing.num_experts} experts, the weights hold {num_experts}")


def _check_dtypes(x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None) -> None:
    for name, t in (("w_in", w_in), ("w_out", w_out), ("b_in", b_in), ("b_out", b_out)):
        if t is not None and t.dtype != x.dtype:
            raise ConfigError(f"{name} is {t.dtype} and x {x.dtype}, allowed: the same dtype, or autocast")
