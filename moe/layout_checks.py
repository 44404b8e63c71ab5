"""Whether a model and its sequences can be cut as a layout asks: said before any process group or memory is taken."""

from __future__ import annotations

import torch

from ..kernels import ConfigError
from ..parallel.context.zigzag import check_length
from ..parallel.layout import ResolvedLayout
from ..parallel.meshes import Meshes
from .adapters import AdapterExperts
from .build import ModelPlan
from .models.config import check_tensor_parallel


def check_layout(layout: ResolvedLayout, model: ModelPlan, sequence_length: int) -> None:
    """Raises: ConfigError that names the first size that does not divide what it cuts, and what is allowed."""
    config = model.config
    for name in ("ep", "etp"):
        size = getattr(layout, name)
        if size > 1 and not model.is_moe:
            raise ConfigError(f"layout.{name}={size} with model.num_experts={config.num_experts}, allowed: 1")
        of, whole = ("model.num_experts", config.num_experts) if name == "ep" else _expert_width(model)
        if whole is not None and whole % size:
            allowed = ", ".join(str(number) for number in range(1, whole + 1) if whole % number == 0)
            raise ConfigError(f"layout.{name}={size} does not divide {of}={whole}, allowed: {allowed}")
    if model.is_moe:
        model.make_dispatcher(Meshes(layout))  # refuses what its transport cannot do
    check_tensor_parallel(config, layout.tp)
    if _adapter_width(model) is not None and (config.expert_width or 0) % layout.tp:
        raise ConfigError(
            f"layout.tp={layout.tp} does not divide model.expert_width={config.expert_width}, which adapters share, "
            "allowed: a divisor of it"
        )
    check_length(sequence_length, layout.cp, layout.tp)
    if layout.pp > 1 and config.tie_embeddings:
        raise ConfigError(f"model.tie_embeddings=true with layout.pp={layout.pp}, allowed: false, or layout.pp=1")


def _expert_width(model: ModelPlan) -> tuple[str, int | None]:
    """What expert tensor parallelism cuts, and its field."""
    adapters = _adapter_width(model)
    return (
        ("model.expert_width", model.config.expert_width) if adapters is None else ("experts.adapter_width", adapters)
    )


def _adapter_width(model: ModelPlan) -> int | None:
    """Of experts that are adapters on one MLP; None for others."""
    if not model.is_moe:
        return None
    with torch.device("meta"):
        experts = model.make_experts()
    return experts.expert_width if isinstance(experts, AdapterExperts) else None


def check_ring(model: ModelPlan, sequence_length: int, *, device: str, precision: str, pack_documents: bool) -> None:
    """What `parallel.context.ring` needs. Raises: ConfigError that names the first thing that it lacks."""
    window, head_width = model.config.sliding_window, model.config.head_size
    reason = None
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        reason = "runs on CUDA only", "gather"
    elif precision != "bf16":
        reason = f"cannot compute with trainer.precision={precision}", "trainer.precision=bf16, or gather"
    elif pack_documents:
        reason = "cannot keep packed documents apart", "data.pack_documents=false, or gather"
    elif window is not None and window < sequence_length:
        reason = f"knows no model.sliding_window={window}", "gather"
    elif model.config.attention_sinks or model.config.latent_attention is not None:
        what = "attention_sinks" if model.config.attention_sinks else "latent_attention"
        reason = f"knows no model.{what}", "gather"
    elif head_width % 8:
        reason = f"cannot compute heads of width {head_width}", "a multiple of 8, or gather"
    if reason is not None:
        raise ConfigError(f"trainer.context_attention=ring {reason[0]}, allowed: {reason[1]}")
