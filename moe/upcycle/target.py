"""Which format, and which architecture of others, the result is written in."""

from __future__ import annotations

from ...kernels import ConfigError
from ..interop.stored import StoredModel

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
    try:
        if asked is not None:
            ARCHITECTURES[asked].write_config(result.plan())
            return asked
        preferred = MIXTURE_OF.get(str(result.origin.get("model_type")))
        return choose_architecture(result.config, preferred).model_type
    except ConfigError as error:
        raise ConfigError(f"{error}, or to=scatterfold") from None
