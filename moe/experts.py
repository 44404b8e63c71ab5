"""The experts of a MoE layer: stacked MLPs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels import ConfigError, Routing, is_gated, moe_mlp
from ..kernels.fused_operator import check_recompute
from ..kernels.moe_mlp import check_backend
from ..parallel.shards import local_part, local_range


class Experts(nn.Module):
    """E MLPs of one shape, their weights stacked so that one kernel serves all of them.

    Args:
        num_experts: E.
        width: D.
        expert_width: F.
        activation: one of `kernels.ACTIVATIONS`.
        backend: kernel to use, one of `kernels.BACKENDS`; None for the fastest that runs here.
        bias: learn a bias before the activation and one of the output.
        recompute: what the backward pass computes again: none, or all, which keeps the rows and the routing tables
            only and not the pre-activations.

    Shapes: rows (R, D), routing over R tokens and E experts -> (R, D). w_in is (E, 2, F, D) if the activation is
    gated (gate first), else (E, F, D); w_out is (E, D, F); with biases, b_in is (E, 2, F) or (E, F) and b_out (E, D).
    Raises: ConfigError for an unknown activation, backend or recompute, or a size below 1.

    Parameters may be DTensors cut over the experts (ep) and over F (etp): rows and routing are then those of this
    rank's experts, and the output is the part of its slice of F. Only the first slice adds b_out, so on the other etp
    ranks its gradient is zero; the sum over the etp ranks is the gradient.
    """

    b_in: nn.Parameter | None
    b_out: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        width: int,
        expert_width: int,
        activation: str = "swiglu",
        backend: str | None = None,
        bias: bool = False,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        for name, size in (("num_experts", num_experts), ("width", width), ("expert_width", expert_width)):
            if size < 1:
                raise ConfigError(f"model.{name}={size} is too small, allowed: 1 or more")
        self.num_experts, self.width, self.expert_width = num_experts, width, expert_width
        self.activation = activation
        self.backend = check_backend(backend)
        check_recompute(recompute, "experts.recompute")
        self.recompute = recompute
        hidden = (2, expert_width) if is_gated(activation) else (expert_width,)
        self.w_in = nn.Parameter(torch.empty(num_experts, *hidden, width))
        self.w_out = nn.Parameter(torch.empty(num_experts, width, expert_width))
        self.register_parameter("b_in", nn.Parameter(torch.empty(num_experts, *hidden)) if bias else None)
        self.register_parameter("b_out", nn.Parameter(torch.empty(num_experts, width)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each expert as the dense MLP of its shape: variance 1 / fan_in, fan_in not counting experts."""
        for weight in (self.w_in, self.w_out):
            nn.init.trunc_normal_(weight, std=weight.shape[-1] ** -0.5, a=-1.0, b=1.0)
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def stacked(self) -> Experts:
        """The part whose parameters are stacked over the experts, which ep and etp cut: all of it."""
        return self

    def share(self, group: dist.ProcessGroup | None) -> None:
        """Tell what runs before the dispatch over which tp ranks it is cut: nothing does."""

    def before(self, hidden_TD: Tensor) -> Tensor:
        """What every token passes once, before it travels to its experts: nothing."""
        return hidden_TD

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        w_in, w_out = local_part(self.w_in), local_part(self.w_out)
        b_in = None if self.b_in is None else local_part(self.b_in)
        b_out = None if self.b_out is None else local_part(self.b_out)
        if is_gated(self.activation):
            w_in = w_in.flatten(1, 2)
            b_in = None if b_in is None else b_in.flatten(1, 2)
        if b_out is not None and not _is_first_slice(self.w_out):
            b_out = b_out * 0.0  # and not None: every rank needs a gradient to sum
        return moe_mlp(
            rows,
            w_in,
            w_out,
            routing,
            self.activation,
            self.backend,
            b_in=b_in,
            b_out=b_out,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        bias = "" if self.b_in is None else ", with biases"
        return f"{self.num_experts} x ({self.width} -> {self.expert_width} -> {self.width}), {self.activation}{bias}"


def _is_first_slice(w_out: Tensor) -> bool:
    """Whether this rank holds the first slice of F, or all of it."""
    return local_range(w_out, 2).start == 0
