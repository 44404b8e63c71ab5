"""Dense MLPs: a block's own, and the shared expert of a MoE layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

from ...kernels import activate, is_gated
from ...parallel.tensor.collectives import gather_rows, scatter_rows
from .linear import Linear

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


class MLP(nn.Module):
    """Two projections around an activation; three where it is gated.

    Args:
        group: tp ranks over which F is cut, and the tokens outside; None for all of both here.

    Shapes: (..., D) -> (..., D); w_gate.weight, which is there if the activation is gated, and w_up.weight (F, D);
    w_out.weight (D, F).
    """

    def __init__(
        self, width: int, ffn_width: int, activation: str = "swiglu", group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.activation = activation
        self.group = group
        self.w_gate = Linear(width, ffn_width, bias=False) if is_gated(activation) else None
        self.w_up = Linear(width, ffn_width, bias=False)
        self.w_out = Linear(ffn_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = gather_rows(x, self.group)
        if self.w_gate is None:
            hidden = activate(self.activation, self.w_up(x))
        else:
            hidden = activate(self.activation, self.w_gate(x), self.w_up(x))
        return scatter_rows(self.w_out(hidden), self.group)

    def tensor_styles(self) -> dict[str, ParallelStyle]:
        """How tensor parallelism cuts it, by module name."""
        from ...parallel.tensor.styles import cut_inputs, cut_outputs

        styles = {"w_up": cut_outputs(), "w_out": cut_inputs()}
        return styles if self.w_gate is None else {**styles, "w_gate": cut_outputs()}

    def extra_repr(self) -> str:
        return self.activation


class GatedMLP(MLP):
    """An MLP whose output each token scales by a sigmoid gate: the shared expert of Qwen2-MoE.

    Shapes: (..., D) -> (..., D); gate.weight (1, D), whole on every tp rank.
    """

    def __init__(
        self, width: int, ffn_width: int, activation: str = "swiglu", group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(width, ffn_width, activation, group)
        self.gate = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid() * super().forward(x)
