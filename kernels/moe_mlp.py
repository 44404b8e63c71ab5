"""`moe_mlp`: the sum over (token, expert) of weight * expert(x), by the backend that fits."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import check_activation, is_gated
from .backends import BACKENDS, check_serves, choose_backend
from .errors import ConfigError
from .routing import Routing


def moe_mlp(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    activation: str = "swiglu",
    backend: str | None = None,
) -> Tensor:
    """Run every token through its experts and sum the outputs by the combine weights.

    No padding, and no permuted copy of the tokens is kept. Differentiable in x, w_in, w_out and routing.weight.
    Under autocast, x and the weights are cast to the autocast dtype.

    Args:
        x: (T, D).
        w_in: (E, 2F, D) for gated activations, gate rows first; (E, F, D) otherwise.
        w_out: (E, D, F).
        routing: over T tokens and E experts, with any number of experts per token.
        activation: one of `kernels.ACTIVATIONS`.
        backend: one of `kernels.BACKENDS`; None for the fastest that runs here.

    Returns: (T, D); rows that no expert takes are zero.
    Raises: ConfigError for an unknown name, a backend that cannot run here, or shapes that do not fit.
    """
    _check(x, w_in, w_out, routing, activation)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    name = check_backend(backend) or choose_backend(x.device, x.dtype, *w_out.shape[1:]).backend
    check_serves(name, x)
    run = BACKENDS[name]
    with torch.autocast(x.device.type, enabled=False):
        return run(x, w_in, w_out, routing, activation)


def check_backend(name: str | None) -> str | None:
    """The name itself; ConfigError if there is no such backend."""
    if name is not None and name not in BACKENDS:
        raise ConfigError(f"experts.backend={name!r} is unknown, allowed: null, {', '.join(BACKENDS)}")
    return name


def _check(x: Tensor, w_in: Tensor, w_out: Tensor, routing: Routing, activation: str) -> None:
    check_activation(activation)
    num_experts, width, expert_width = w_out.shape
    rows = 2 * expert_width if is_gated(activation) else expert_width
    if tuple(w_in.shape) != (num_experts, rows, width):
        raise ConfigError(f"w_in has shape {tuple(w_in.shape)}, {activation} needs {(num_experts, rows, width)}")
    if tuple(x.shape) != (routing.num_tokens, width):
        raise ConfigError(f"x has shape {tuple(x.shape)}, routing and w_out need {(routing.num_tokens, width)}")
    if routing.num_experts != num_experts:
        raise ConfigError(f"routing is over {routing.num_experts} experts, the weights hold {num_experts}")
