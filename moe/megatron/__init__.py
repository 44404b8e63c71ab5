"""Scatterfold's MoE layer inside Megatron-Core's GPTModel, without Transformer Engine.

Megatron is imported only when one of these names is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import transformer_config
    from .engine import MegatronEngine
    from .layer import Cut, MegatronMoELayer
    from .model import ScatterfoldGPT, build_gpt_model
    from .spec import decoder_block_spec
    from .weights import Part, load_ours, local_parts, to_ours

_HOMES = {
    "config": ("transformer_config",),
    "engine": ("MegatronEngine",),
    "layer": ("Cut", "MegatronMoELayer"),
    "model": ("ScatterfoldGPT", "build_gpt_model"),
    "spec": ("decoder_block_spec",),
    "weights": ("Part", "load_ours", "local_parts", "to_ours"),
}
__all__ = [
    "Cut",
    "MegatronEngine",
    "MegatronMoELayer",
    "Part",
    "ScatterfoldGPT",
    "build_gpt_model",
    "decoder_block_spec",
    "load_ours",
    "local_parts",
    "to_ours",
    "transformer_config",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
