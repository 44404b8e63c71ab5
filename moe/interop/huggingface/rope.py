"""Rotary embeddings in a config.json, in the old spelling (rope_theta, rope_scaling) and the new (rope_parameters)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...blocks import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from ...models.config import ModelConfig
from .config_json import ConfigJson
from .misfit import Misfit

_ORIGINAL = "original_max_position_embeddings"
ROPE_DEFAULTS = {
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    _ORIGINAL: None,
    "max_position_embeddings": 2048,
}
_TARGETS: dict[type[RopeScaling], str] = {
    cls: f"scatterfold.moe.blocks.{cls.__name__}" for cls in (LinearScaling, Llama3Scaling, YarnScaling)
}
_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
_KNOWN = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL, *_YARN),
}
_ANYWHERE = ("rope_theta", "rope_type", "type", "partial_rotary_factor")


def read_rope(hf: ConfigJson) -> dict[str, Any]:
    """`max_positions`, `rope_theta` and `rope_scaling` of our model group.

    As transformers reads them: rope_scaling wins over rope_parameters, what stands in them over what stands outside.

    Raises: CheckpointError for a kind of scaling, or a setting of one, that we do not have.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    given = hf.get(key) or {}
    if not isinstance(given, Mapping):
        raise hf.refusal(key, "null or an object")
    kind = given.get("rope_type", given.get("type", "default")) or "default"
    if not isinstance(kind, str) or kind not in _KNOWN or any(isinstance(value, Mapping) for value in given.values()):
        raise hf.refusal(key, f"null, or one object for all layers with rope_type {', '.join(_KNOWN)}")
    unknown = [name for name in given if name not in (*_KNOWN[kind], *_ANYWHERE) and given[name] is not None]
    if unknown and kind != "default":
        raise hf.refusal(key, f"with rope_type={kind}, these: {', '.join(_KNOWN[kind])}; not {unknown[0]}")
    rope = ConfigJson(hf.file, {name: value for name, value in given.items() if value is not None}, hf)
    length = hf.whole("max_position_embeddings", 1)
    read: dict[str, Any] = {"max_positions": length, "rope_theta": rope.real("rope_theta")}
    if kind == "linear":
        read["rope_scaling"] = _node(LinearScaling, factor=rope.real("factor"))
    elif kind != "default":
        original = hf.whole_or_none(_ORIGINAL, 1) or rope.whole_or_none(_ORIGINAL, 1) or length
        scaling = _read_llama3(rope, original) if kind == "llama3" else _read_yarn(rope, original, length)
        read["rope_scaling"] = scaling
    return read


def rotary_fraction(hf: ConfigJson) -> float:
    """The part of a head's width that turns; what stands in the object wins over what stands outside.

    Raises: CheckpointError if it is not above 0 and at most 1.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    inside = (hf.get(key) or {}).get("partial_rotary_factor")
    outside = hf.get("partial_rotary_factor")
    fraction = next((one for one in (inside, outside) if one is not None), 1.0)
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise hf.refusal("partial_rotary_factor" if inside is None else key, "a fraction above 0, at most 1")
    return float(fraction)


def demand_whole_rotation(hf: ConfigJson) -> None:
    """Raises: CheckpointError if only a part of each head turns."""
    if rotary_fraction(hf) != 1.0:
        outside = hf.get("partial_rotary_factor")
        key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
        raise hf.refusal(key if outside is None else "partial_rotary_factor", "a partial_rotary_factor of 1")


def write_rope(model_type: str, config: ModelConfig, fraction: float = 1.0) -> dict[str, Any]:
    """Both spellings of a model's rotary embedding, so that old and new readers see the same.

    Raises: Misfit for a scaling that is none of theirs.
    """
    if config.rope_scaling is not None and type(config.rope_scaling) not in _TARGETS:
        raise Misfit(model_type, "model.rope_scaling", config.rope_scaling, f"null, {', '.join(_TARGETS.values())}")
    scaling = _describe(config.rope_scaling)
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta}
    partial = {} if fraction == 1.0 else {"partial_rotary_factor": fraction}
    return {
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {**scaling, **partial},
        "rope_parameters": {**parameters, **partial},
        **partial,
    }


def _read_llama3(rope: ConfigJson, original: int) -> dict[str, Any]:
    return _node(
        Llama3Scaling,
        factor=rope.real("factor"),
        original_positions=original,
        low_freq_factor=rope.real("low_freq_factor"),
        high_freq_factor=rope.real("high_freq_factor"),
    )


def _read_yarn(rope: ConfigJson, original: int, length: int) -> dict[str, Any]:
    factor = length / original if rope.values_given.get("factor") is None else rope.real("factor")
    settings = {name: rope.values_given[name] for name in _YARN if name in rope.values_given}
    for name in ("beta_fast", "beta_slow"):
        if not settings.get(name, True):  # 0 stands for the default, as transformers takes it
            del settings[name]
    return _node(YarnScaling, factor=factor, original_positions=original, **settings)


def _node(cls: type[RopeScaling], **settings: Any) -> dict[str, Any]:
    return {"_target_": _TARGETS[cls], **settings}


def _describe(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            _ORIGINAL: scaling.original_positions,
        }
    assert isinstance(scaling, YarnScaling)
    settings = {name: getattr(scaling, name) for name in _YARN}
    return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        _ORIGINAL: scaling.original_positions,
        **{name: value for name, value in settings.items() if value is not None and value is not True},
    }
