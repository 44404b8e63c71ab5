"""transformers' expert layer, the one class behind Mixtral, Qwen3-MoE and their kin, by each of its implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from .....moe.interop.transformers import register
from ..case import Case, Layer, Refused, leaf

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
PLUGIN = "scatterfold"  # ours, as transformers calls it: with its own routing tables and checks at every forward pass
MOST_COPIED = 2 * 2**30  # bytes; batched_mm copies an expert's weights for every assignment


def build(implementation: str, case: Case) -> Layer:
    """`Qwen3MoeExperts` with `experts_implementation`; combine weights in the model's dtype, as from its router."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    if implementation == PLUGIN:
        register()
    shape = case.shape
    copied = 3 * shape.assignments * shape.width * shape.expert_width * case.dtype.itemsize
    if implementation == "batched_mm" and copied > MOST_COPIED:
        raise Refused(f"would copy {copied / 2**30:,.0f} GiB of weights")
    config = Qwen3MoeConfig(
        hidden_size=shape.width,
        moe_intermediate_size=shape.expert_width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
        experts_implementation=implementation,  # type: ignore[call-arg]
    )
    with torch.device("meta"):
        layer = Qwen3MoeExperts(config)
    layer.gate_up_proj = torch.nn.Parameter(case.w_in)
    layer.down_proj = torch.nn.Parameter(case.w_out)
    x, weights = leaf(case.x), leaf(case.weights.to(case.dtype))

    def forward() -> Tensor:
        return layer(x, case.experts, weights)

    return Layer(forward, x, case.grad, tuple(layer.parameters()), weights)
