"""The reference path: what `moe_mlp` means, in plain torch, one expert after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .activations import activate
from .fused_operator import check_recompute
from .routing import Routing
from .untraced import untraced


@untraced  # its loop reads the offsets: one trace per batch would be made
def moe_mlp_reference(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    activation: str,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    recompute: str = "none",
) -> Tensor:
    """Sum over the experts of each token of weight * (w_out[e] @ activation(w_in[e] @ x + b_in[e]) + b_out[e]).

    Autograd writes the backward; every intermediate is kept, or with recompute="all" none. Any dtype, float64 included.

    Shapes: x (T, D), w_in (E, 2F or F, D), w_out (E, D, F), b_in (E, 2F or F), b_out (E, D) -> (T, D).
    """
    check_recompute(recompute)
    inputs = (x, w_in, w_out, routing, activation, b_in, b_out)
    if recompute == "none":
        return _loop(*inputs)
    return checkpoint(_loop, *inputs, use_reentrant=False, preserve_rng_state=False)


def _loop(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    activation: str,
    b_in: Tensor | None,
    b_out: Tensor | None,
) -> Tensor:
    out = torch.zeros_like(x)
    offsets = routing.expert_offsets.tolist()
    for expert in range(routing.num_experts):
        rows = slice(offsets[expert], offsets[expert + 1])
        token = routing.token[rows].long()
        z = x[token] @ w_in[expert].T
        hidden = activate(activation, z if b_in is None else z + b_in[expert])
        y = hidden @ w_out[expert].T
        weight = routing.weight[rows, None].to(x.dtype)
        out = out.index_add(0, token, weight * (y if b_out is None else y + b_out[expert]))
    return out
