"""What a transformer, or its parts, tell an engine about where they may be cut."""

from __future__ import annotations

from collections.abc import Sequence

from ..parallel.plan import ShardingPlan, StackedExperts
from .models.transformer import Transformer

# Which dimension of each expert parameter runs over F, over which expert tensor parallelism cuts.
EXPERT_WIDTH_DIMENSIONS = {"w_in": -2, "w_out": -1, "b_in": -1}


def sharding_plan(parts: Sequence[Transformer]) -> ShardingPlan:
    """The plan of all parts that one rank holds, in the order of the layers."""
    layers = [layer for part in parts for _, layer in part.moe_layers()]
    return ShardingPlan(
        units=[unit for part in parts for unit in part.sharding_units()],
        float32=[layer.router for layer in layers],
        experts=[StackedExperts(layer.experts.stacked, EXPERT_WIDTH_DIMENSIONS) for layer in layers],
        tensor_styles={name: style for part in parts for name, style in part.tensor_styles().items()},
    )
