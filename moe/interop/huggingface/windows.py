"""Sliding windows in a config.json: one for all layers, or layer by layer in layer_types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...build import ModelPlan
from .config_json import ConfigJson

SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS = {"sliding_window": ..., "window_layers": ...}  # for `demand_model`: any layer may have the window


def read_window(hf: ConfigJson, slides: Sequence[bool], window: int | None, by_layer: bool = False) -> dict[str, Any]:
    """`sliding_window` and `window_layers` of our model group.

    Args:
        slides: which layers have the window where layer_types does not say.
        window: the tokens that a token sees, itself included; None for all.
        by_layer: whether the class goes by layer_types; one that does not must not be told anything else there.

    Raises: CheckpointError for layer_types that do not fit, or of another kind.
    """
    types = hf.get("layer_types")
    if types is not None:
        known = isinstance(types, list) and all(kind in (SLIDING, FULL) for kind in types)
        if not known or len(types) != len(slides):
            raise hf.refusal("layer_types", f"{len(slides)} times {SLIDING} or {FULL}")
        told = [kind == SLIDING for kind in types]
        if window is None and any(told):
            raise hf.refusal("layer_types", f"{FULL} alone where there is no sliding_window")
        if window is not None and not by_layer and told != list(slides):
            raise hf.refusal("layer_types", f"null, or {SLIDING} in all layers, since there is a sliding_window")
        slides = told
    if window is None or not any(slides):
        return {}
    sliding = [layer for layer, slide in enumerate(slides) if slide]
    return {"sliding_window": window, **({} if all(slides) else {"window_layers": sliding})}


def read_switched_window(hf: ConfigJson, slides: Sequence[bool], by_layer: bool = False) -> dict[str, Any]:
    """The same where use_sliding_window turns it on (Qwen)."""
    window = hf.whole("sliding_window", 1) if hf.flag("use_sliding_window") else None
    return read_window(hf, slides, window, by_layer)


def write_switched_window(plan: ModelPlan) -> dict[str, Any]:
    """Their keys of it; max_window_layers is for readers that do not know layer_types."""
    config = plan.config
    slides = [config.window_of(layer) is not None for layer in range(config.layers)]
    return {
        "use_sliding_window": any(slides),
        "sliding_window": config.sliding_window if any(slides) else None,
        "max_window_layers": slides.index(True) if any(slides) else config.layers,
        "layer_types": [SLIDING if slide else FULL for slide in slides],
    }
