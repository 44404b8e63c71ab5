"""How a backend of `moe_mlp` becomes an operator: opaque to torch.compile, with fake results and a gradient.

A backend is two passes over an `ExpertLayer`.

Saved for backward: x, the pre-activation z (N, 2F or F) and the routing tables; with recompute="all" x and the tables.
Weights are saved by reference. So no backend can save more by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError
from .needed import needed_gradients
from .operators import registered
from .routing import Routing

RECOMPUTE = ("none", "all")


def check_recompute(name: str, field: str = "recompute") -> None:
    """Raise ConfigError if there is no such way to save memory."""
    if name not in RECOMPUTE:
        raise ConfigError(f"{field}={name!r} is unknown, allowed: {', '.join(RECOMPUTE)}")


@dataclass(frozen=True)
class ExpertLayer:
    """What both passes of a backend are given.

    Shapes: x (T, D), w_in (E, 2F or F, D), w_out (E, D, F), b_in (E, 2F or F), b_out (E, D); the rest as in `Routing`.
    """

    x: Tensor
    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    weight: Tensor
    token: Tensor
    expert_offsets: Tensor
    assignment: Tensor
    token_offsets: Tensor
    activation: str

    @property
    def num_tokens(self) -> int:
        return self.token_offsets.numel() - 1

    def new_gradients(self, needs: list[bool], make: Callable[..., Tensor] = torch.empty_like) -> list[Tensor]:
        """`new_gradients` of x, w_in, w_out, b_in, b_out and weight."""
        return new_gradients((self.x, self.w_in, self.w_out, self.b_in, self.b_out, self.weight), needs, make)


def fused_operator(
    name: str,
    forward_pass: Callable[[ExpertLayer, bool], tuple[Tensor, Tensor]],
    backward_pass: Callable[[ExpertLayer, Tensor, Tensor, list[bool]], list[Tensor]],
) -> Callable[..., Tensor]:
    """A differentiable `f(x, w_in, w_out, routing, activation, b_in, b_out, recompute)` from two passes.

    Args:
        name: of the operators, `{name}` and `{name}_backward`.
        forward_pass: (layer, save_z) -> (out (T, D), z (N, 2F or F), or empty unless save_z).
        backward_pass: (layer, grad, z, needs) -> gradients of x, w_in, w_out, b_in, b_out and weight; those not in
            `needs` are empty. An empty z has to be computed again.
    """

    @registered(name)
    def forward(
        x: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None,
        b_out: Tensor | None,
        weight: Tensor,
        token: Tensor,
        expert_offsets: Tensor,
        assignment: Tensor,
        token_offsets: Tensor,
        activation: str,
        save_z: bool,
    ) -> tuple[Tensor, Tensor]:
        tables = token, expert_offsets, assignment, token_offsets
        return forward_pass(ExpertLayer(x, w_in, w_out, b_in, b_out, weight, *tables, activation), save_z)

    @registered(f"{name}_backward")
    def backward(
        grad: Tensor,
        x: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None,
        b_out: Tensor | None,
        weight: Tensor,
        token: Tensor,
        expert_offsets: Tensor,
        assignment: Tensor,
        token_offsets: Tensor,
        z: Tensor,
        activation: str,
        needs: list[bool],
    ) -> list[Tensor]:
        tables = token, expert_offsets, assignment, token_offsets
        return backward_pass(ExpertLayer(x, w_in, w_out, b_in, b_out, weight, *tables, activation), grad, z, needs)

    @forward.register_fake
    def _(x, w_in, w_out, b_in, b_out, weight, token, expert_offsets, assignment, token_offsets, activation, save_z):
        z = x.new_empty(token.shape[0], w_in.shape[1]) if save_z else x.new_empty(0)
        return x.new_empty(token_offsets.shape[0] - 1, w_out.shape[1]), z

    @backward.register_fake
    def _(grad, *inputs_z_activation_needs):
        return new_gradients(inputs_z_activation_needs[:6], inputs_z_activation_needs[-1])

    def setup(ctx, inputs, output):
        *tensors, activation, _ = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.activation = activation
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def gradient(ctx, grad, _):
        if grad is None:
            return (None,) * 12
        needs = needed_gradients(ctx, 6)
        grads = backward(grad, *ctx.saved_tensors, ctx.activation, needs)
        return (*(g if need else None for g, need in zip(grads, needs)), *(None,) * 6)

    forward.register_autograd(gradient, setup_context=setup)

    def operator(
        x: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        routing: Routing,
        activation: str,
        b_in: Tensor | None = None,
        b_out: Tensor | None = None,
        recompute: str = "none",
    ) -> Tensor:
        check_recompute(recompute)
        inputs = (x, w_in, w_out, b_in, b_out, routing.weight)
        trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        tables = (routing.token, routing.expert_offsets, routing.assignment, routing.token_offsets)
        out, _ = forward(*inputs, *tables, activation, trained and recompute == "none")
        return out

    return operator


def new_gradients(
    inputs: tuple[Tensor | None, ...], needs: list[bool], make: Callable[..., Tensor] = torch.empty_like
) -> list[Tensor]:
    """Uninitialised, or by `make`, gradients for the inputs that need one, empty tensors for the others."""
    none = next(t for t in inputs if t is not None)
    return [
        make(t, memory_format=torch.contiguous_format) if need and t is not None else none.new_empty(0)
        for t, need in zip(inputs, needs)
    ]
