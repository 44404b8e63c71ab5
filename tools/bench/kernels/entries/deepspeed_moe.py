"""DeepSpeed's `MoE` layer in one process, with the routing of the case instead of its router."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..case import Case, Layer, leaf


def build(case: Case) -> Layer:
    """No token is dropped. Its gate gets the logarithms of the combine weights, so its softmax yields them again."""
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.sharded_moe import topkgating

    shape = case.shape
    with torch.device("meta"):
        moe = MoE(
            shape.width, _Expert(shape.width, shape.expert_width), shape.experts, k=shape.top_k, drop_tokens=False
        )
    experts: Any = moe.deepspeed_moe.experts.deepspeed_experts
    for number, expert in enumerate(experts):
        expert.gate_and_up.weight = nn.Parameter(case.w_in[number])
        expert.down.weight = nn.Parameter(case.w_out[number])
    logits = torch.full((shape.tokens, shape.experts), -torch.inf, device=case.device)
    logits = leaf(logits.scatter(1, case.experts, case.weights.log()))

    class Gate(nn.Module):
        def forward(self, hidden: Tensor, used_token: Tensor | None, sparse_routes: bool, use_tutel: bool):
            return topkgating(logits, shape.top_k, 1.0, 4, drop_tokens=False, sparse_routes=sparse_routes)

    moe.deepspeed_moe.gate = Gate()
    x = leaf(case.x)

    def forward() -> Tensor:
        return moe(x)[0]

    return Layer(forward, x, case.grad, tuple(experts.parameters()), logits)


class _Expert(nn.Module):
    """A SwiGLU MLP, as DeepSpeed's users bring their own."""

    def __init__(self, width: int, expert_width: int):
        super().__init__()
        self.gate_and_up = nn.Linear(width, 2 * expert_width, bias=False)
        self.down = nn.Linear(expert_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
