"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....build import ModelPlan
from ..architecture import Architecture, Groups
from ..config_json import ConfigJson
from ..decoder import DECODER_DEFAULTS, dense_groups, dense_rules, read_decoder, write_decoder
from ..misfit import demand_dense, demand_model
from ..tensor_rules import TensorRule
from ..windows import WINDOWS, read_switched_window, write_switched_window

QWEN_DEFAULTS = {
    **DECODER_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


class Qwen2(Architecture):
    model_type = "qwen2"
    class_name = "Qwen2ForCausalLM"
    defaults = QWEN_DEFAULTS

    def read_config(self, hf: ConfigJson) -> Groups:
        return dense_groups({**read_qwen(hf), "attention_bias": True})

    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        demand_dense(self.model_type, plan)
        demand_model(self.model_type, plan, attention_bias=True, **WINDOWS)
        return {**write_decoder(self.model_type, plan), **write_switched_window(plan)}

    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        return dense_rules(plan)


def read_qwen(hf: ConfigJson) -> dict[str, Any]:
    """The `model` group of a dense Qwen; its first max_window_layers layers see everything."""
    model = {**read_decoder(hf), "ffn_width": hf.whole("intermediate_size", 1)}
    full = hf.whole("max_window_layers")
    return {**model, **read_switched_window(hf, [layer >= full for layer in range(model["layers"])], by_layer=True)}


ARCHITECTURE = Qwen2()
