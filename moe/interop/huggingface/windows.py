"""Sliding windows in a config.json: one for all layers, or layer by layer in layer_types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...build import ModelPlan
from .config_json import ConfigJson

SLIDING, FULL = "sliding_attention", "full_attention"


def read_window(hf: ConfigJson, slides: Sequence[bool], window: int | None) -> dict[str, Any]:
    """`sliding_window` of our model group.

    Args:
        slides: which layers have the window where layer_types does not say.
        window: the tokens that a token sees, itself included; None for all.

    Raises: CheckpointError where some layers have a window and others not, or a layer is of another type.
    """
    types = hf.get("layer_types")
    if types is not None:
        known = isinstance(types, list) and all(kind in (SLIDING, FULL) for kind in types)
        if not known or len(types) != len(slides):
            raise hf.refusal("layer_types", f"{len(slides)} times {SLIDING} or {FULL}")
        slides = [kind == SLIDING for kind in types]
    if window is None or not any(slides):
        if types is not None and any(slides):
            raise hf.refusal("layer_types", f"{FULL} alone where there is no sliding_window")
        return {}
    if not all(slides):
        key = "max_window_layers" if types is None else "layer_types"
        raise hf.refusal(key, f"a sliding window in all {len(slides)} layers, or in none")
    return {"sliding_window": window}


def read_switched_window(hf: ConfigJson, slides: Sequence[bool]) -> dict[str, Any]:
    """The same where use_sliding_window turns it on (Qwen)."""
    window = hf.whole("sliding_window", 1) if hf.flag("use_sliding_window") else None
    return read_window(hf, slides, window)


def write_switched_window(plan: ModelPlan) -> dict[str, Any]:
    """Their keys of it."""
    window, layers = plan.config.sliding_window, plan.config.layers
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": 0 if window is not None else layers,
        "layer_types": [SLIDING if window is not None else FULL] * layers,
    }
