"""The experts of a MoE layer: stacked MLPs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import ConfigError, Routing, is_gated, moe_mlp
from ..kernels.moe_mlp import check_backend


class Experts(nn.Module):
    """E MLPs of one shape, their weights stacked so that one kernel serves all of them.

    Args:
        num_experts: E.
        width: D.
        expert_width: F.
        activation: one of `kernels.ACTIVATIONS`.
        backend: kernel to use, one of `kernels.BACKENDS`; None for the fastest that runs here.

    Shapes: rows (R, D), routing over R tokens and E experts -> (R, D). w_in is (E, 2F, D) if the activation is
    gated (gate rows first), else (E, F, D); w_out is (E, D, F).
    Raises: ConfigError for an unknown activation or backend, or a size below 1.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        expert_width: int,
        activation: str = "swiglu",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_experts", num_experts), ("width", width), ("expert_width", expert_width)):
            if size < 1:
                raise ConfigError(f"model.{name}={size} is too small, allowed: 1 or more")
        self.activation = activation
        self.backend = check_backend(backend)
        rows = 2 * expert_width if is_gated(activation) else expert_width
        self.w_in = nn.Parameter(torch.empty(num_experts, rows, width))
        self.w_out = nn.Parameter(torch.empty(num_experts, width, expert_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each expert as the dense MLP of its shape: variance 1 / fan_in, fan_in not counting experts."""
        for weight in (self.w_in, self.w_out):
            nn.init.trunc_normal_(weight, std=weight.shape[-1] ** -0.5, a=-1.0, b=1.0)

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        return moe_mlp(rows, self.w_in, self.w_out, routing, self.activation, self.backend)

    def extra_repr(self) -> str:
        num_experts, width, expert_width = self.w_out.shape
        return f"{num_experts} x ({width} -> {expert_width} -> {width}), {self.activation}"
