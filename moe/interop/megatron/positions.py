"""Rotary embeddings as fields of Megatron's GPTModel."""

from __future__ import annotations

import math
from typing import Any

from ...blocks import LinearScaling, Llama3Scaling
from ...models.config import ModelConfig
from ..huggingface.config_json import ConfigJson
from ..huggingface.misfit import Misfit

# What they fix of Llama 3.1's scaling: only its factor can be chosen.
_LLAMA3 = {"original_positions": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_BLOCKS = "scatterfold.moe.blocks"


def read_positions(fields: ConfigJson) -> dict[str, Any]:
    """`max_positions`, `rope_theta`, `rope_scaling` and `rotary_width` of our model group.

    Raises: CheckpointError for positions that are not rotary, or scaled in another way.
    """
    if fields.get("position_embedding_type") != "rope":
        raise fields.refusal("position_embedding_type", "rope")
    read: dict[str, Any] = {
        "max_positions": fields.whole("max_sequence_length", 1),
        "rope_theta": fields.real("rotary_base"),
    }
    width = fields.whole_or_none("kv_channels", 1)
    if width is None:
        width = fields.whole("hidden_size", 1) // fields.whole("num_attention_heads", 1)
    percent = fields.real("rotary_percent")
    if percent < 1.0:
        read["rotary_width"] = int(width * percent)
    if fields.flag("rope_scaling"):
        factor = fields.real("rope_scaling_factor")
        read["rope_scaling"] = {"_target_": f"{_BLOCKS}.Llama3Scaling", "factor": factor, **_LLAMA3}
    if fields.get("seq_len_interpolation_factor") not in (None, 1, 1.0):
        if "rope_scaling" in read:
            raise fields.refusal("seq_len_interpolation_factor", "null with rope_scaling=true")
        factor = fields.real("seq_len_interpolation_factor")
        read["rope_scaling"] = {"_target_": f"{_BLOCKS}.LinearScaling", "factor": factor}
    return read


def write_positions(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """Raises: Misfit for a scaling that they do not have."""
    scaling = config.rope_scaling
    fields: dict[str, Any] = {
        "position_embedding_type": "rope",
        "max_sequence_length": config.max_positions,
        "rotary_base": int(config.rope_theta) if config.rope_theta == int(config.rope_theta) else config.rope_theta,
        "rotary_percent": _percent(config.turned_width, config.head_size),
        "rope_scaling": False,
    }
    if isinstance(scaling, LinearScaling):
        fields["seq_len_interpolation_factor"] = scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        for name, value in _LLAMA3.items():
            if getattr(scaling, name) != value:
                raise Misfit(model_type, f"model.rope_scaling.{name}", getattr(scaling, name), str(value))
        fields |= {"rope_scaling": True, "rope_scaling_factor": scaling.factor}
    elif scaling is not None:
        raise Misfit(model_type, "model.rope_scaling", type(scaling).__name__, "null, LinearScaling, Llama3Scaling")
    return fields


def _percent(turned: int, width: int) -> float:
    """They cut the product down to a whole number, so rounding must not take it below."""
    percent = turned / width
    return percent if int(width * percent) == turned else math.nextafter(percent, 1.0)
