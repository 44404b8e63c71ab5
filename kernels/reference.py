"""The reference path: what `moe_mlp` means, in plain torch, one expert after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import activate
from .routing import Routing
from .untraced import untraced


@untraced  # as the CPU path: one trace per batch would be made
def moe_mlp_reference(x: Tensor, w_in: Tensor, w_out: Tensor, routing: Routing, activation: str) -> Tensor:
    """Sum over the experts of each token of weight * w_out[e] @ activation(w_in[e] @ x).

    Autograd writes the backward; every intermediate is kept. Any dtype, float64 included.

    Shapes: x (T, D), w_in (E, 2F or F, D), w_out (E, D, F) -> (T, D).
    """
    out = torch.zeros_like(x)
    offsets = routing.expert_offsets.tolist()
    for expert in range(routing.num_experts):
        rows = slice(offsets[expert], offsets[expert + 1])
        token = routing.token[rows].long()
        hidden = activate(activation, x[token] @ w_in[expert].T)
        weighted = hidden @ w_out[expert].T * routing.weight[rows, None].to(x.dtype)
        out = out.index_add(0, token, weighted)
    return out
