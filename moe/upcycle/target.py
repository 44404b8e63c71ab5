"""Which format, and which architecture of others, the result is written in."""

from __future__ import annotations

import contextlib

from ...kernels import ConfigError
from ..interop.stored import StoredModel
from ..models.config import ModelConfig

# The mixture whose attention is that of a dense architecture of Hugging Face: tried before the others.
MIXTURE_OF = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


def target_of(source: StoredModel, to: str | None) -> str:
    """The format to write: the one asked for, or the one that was read."""
    if to is not None:
        return to
    return "scatterfold" if source.format == "checkpoint" else source.format


def architecture_of(result: StoredModel, to: str, asked: str | None = None) -> str | None:
    """The `model_type` to write for Hugging Face; None for other formats.

    Args:
        result: the MoE, with the `origin` of the dense model.
        asked: by the user, None for whichever fits.

    Raises: ConfigError, before any work, if none can say what the MoE computes.
    """
    if to != "huggingface":
        if asked is not None:
            raise ConfigError(f"architecture={asked} does not go with to={to}, allowed: with to=huggingface")
        return None
    from ..interop.huggingface import ARCHITECTURES, choose_architecture

    if asked is not None and asked not in ARCHITECTURES:
        raise ConfigError(f"architecture={asked} is unknown, allowed: {', '.join(ARCHITECTURES)}")
    if asked is None:
        asked = MIXTURE_OF.get(str(result.origin.get("model_type"))) or _by_attention(result.plan().config)
        with contextlib.suppress(ConfigError):
            return choose_architecture(result.config, asked).model_type
    try:
        ARCHITECTURES[asked].write_config(result.plan())
    except ConfigError as error:
        raise ConfigError(f"{error}, or to=scatterfold") from None
    return asked


def _by_attention(config: ModelConfig) -> str:
    """The mixture that comes closest."""
    if config.qk_norm != "none":
        return "qwen3_moe" if config.qk_norm == "head" else "olmoe"
    return "qwen2_moe" if config.attention_bias else "mixtral"
