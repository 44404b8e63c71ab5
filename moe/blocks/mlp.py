"""Dense MLPs: a block's own, and the shared expert of a MoE layer."""

from __future__ import annotations

from torch import Tensor, nn

from ...kernels import activate, is_gated


class MLP(nn.Module):
    """Two projections around an activation. Gate and up projection are one matrix, gate rows first, as in `Experts`.

    Shapes: (..., D) -> (..., D); w_in.weight (2F, D) if the activation is gated, else (F, D); w_out.weight (D, F).
    """

    def __init__(self, width: int, ffn_width: int, activation: str = "swiglu") -> None:
        super().__init__()
        self.activation = activation
        self.w_in = nn.Linear(width, 2 * ffn_width if is_gated(activation) else ffn_width, bias=False)
        self.w_out = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(activate(self.activation, self.w_in(x)))

    def extra_repr(self) -> str:
        return self.activation


class GatedMLP(MLP):
    """An MLP whose output each token scales by a sigmoid gate: the shared expert of Qwen2-MoE.

    Shapes: (..., D) -> (..., D); gate.weight (1, D).
    """

    def __init__(self, width: int, ffn_width: int, activation: str = "swiglu") -> None:
        super().__init__(width, ffn_width, activation)
        self.gate = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid() * super().forward(x)
