"""Our description of a model and of its layout as Megatron's TransformerConfig, and as arguments of GPTModel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ...kernels import ConfigError
from ...parallel.layout import ResolvedLayout
from ..blocks.block import CHECKPOINTING
from ..build import ModelPlan
from ..interop.huggingface.misfit import Misfit
from ..interop.megatron.groups import ACTIVATIONS, activation_fields, shape_fields
from ..interop.megatron.positions import write_positions
from ..models.config import ModelConfig, check_tensor_parallel
from .layer import check_experts

ENGINE = "engine=megatron"
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "quick_gelu": quick_gelu,
    "squared_relu": squared_relu,
}
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of blocks.Block: full recomputes whole layers, selective the half that holds MLP or experts.
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}


def transformer_config(
    plan: ModelPlan,
    *,
    layout: ResolvedLayout,
    sequence_parallel: bool | None = None,
    precision: str = "fp32",
    checkpointing: str = "none",
    virtual_stages: int | None = None,
    **others: Any,
) -> TransformerConfig:
    """The TransformerConfig of a model of ours. Reads no process group: it may be made, and refuse, before any start.

    Losses are per token (`calculate_per_token_loss`): DDP sums gradients over all ranks and divides by nothing, as our
    engines do, so a forward step returns its summed loss times `scale`, and finalize_model_grads gets no num_tokens.

    Args:
        plan: the model; router, experts and dispatcher of its MoE layers may be any of ours but adapters.
        layout: sizes of the groups that `parallel_state.initialize_model_parallel` makes (order tp-cp-ep-dp-pp).
        sequence_parallel: None for where tp > 1, which MoE layers need.
        precision: fp32, or bf16: parameters and pipeline messages in bfloat16, the router's weights in float32.
        checkpointing: none, full or selective, as described at `blocks.Block`.
        virtual_stages: stages of each pipeline rank in the interleaved schedule; None for one.
        others: fields of TransformerConfig that only say how something is computed (fusions, overlap).

    Raises: ConfigError that names the field that Megatron, or Megatron without Transformer Engine, cannot do.
    """
    config = plan.config
    for name, value, allowed in (
        ("trainer.precision", precision, _PRECISIONS),
        ("trainer.activation_checkpointing", checkpointing, CHECKPOINTING),
    ):
        if value not in allowed:
            raise ConfigError(f"{name}={value!r} is unknown, allowed: {', '.join(allowed)}")
    _check_model(plan)
    _check_layout(plan, layout, virtual_stages)
    dtype = _PRECISIONS[precision]
    activation = activation_fields(config.activation)
    activation["activation_func"] = _FUNCTIONS[activation["activation_func"]]
    fields: dict[str, Any] = {
        **shape_fields(config),
        "add_qkv_bias": config.attention_bias,
        "add_bias_linear": config.attention_output_bias,
        **activation,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": virtual_stages,
        "context_parallel_size": layout.cp,
        "sequence_parallel": layout.tp > 1 if sequence_parallel is None else sequence_parallel,
        "calculate_per_token_loss": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision == "bf16",
        "perform_initialization": False,  # `weights.reset_parameters` does it
        "use_cpu_initialization": not torch.cuda.is_available(),
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        **_RECOMPUTE[checkpointing],
    }
    if virtual_stages is not None:  # one batch of messages would mix up both directions between two ranks
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if plan.is_moe:
        fields |= {
            "num_moe_experts": config.num_experts,  # lets schedules scale auxiliary losses
            "moe_ffn_hidden_size": config.expert_width,
            "moe_router_load_balancing_type": "none",
            "expert_model_parallel_size": layout.ep,
            "expert_tensor_parallel_size": layout.etp,
        }
        if len(plan.moe_layers) < config.layers:
            fields["moe_layer_freq"] = [int(config.is_moe(layer)) for layer in range(config.layers)]
    return TransformerConfig(**{**fields, **others})


def model_arguments(config: ModelConfig) -> dict[str, Any]:
    """What GPTModel takes besides a TransformerConfig: vocabulary and positions."""
    return {
        "vocab_size": config.vocab_size,
        "share_embeddings_and_output_weights": config.tie_embeddings,
        **write_positions(ENGINE, config),
    }


def _check_model(plan: ModelPlan) -> None:
    """Raises: ConfigError for what Megatron's attention, dense MLPs and positions do not have."""
    config = plan.config
    if config.latent_attention is not None:
        raise ConfigError(f"model.latent_attention does not run in {ENGINE}, allowed: null, or engine=torch")
    if config.qk_norm == "projection":
        raise Misfit(ENGINE, "model.qk_norm", config.qk_norm, "none, head")
    if config.activation not in ACTIVATIONS:
        raise Misfit(ENGINE, "model.activation", config.activation, ", ".join(ACTIVATIONS))
    if config.attention_output_bias and not config.attention_bias:
        raise Misfit(ENGINE, "model.attention_output_bias", True, "false, or with model.attention_bias=true")
    if config.attention_output_bias and len(plan.moe_layers) < config.layers:
        raise Misfit(ENGINE, "model.attention_output_bias", True, "false in a model with dense MLPs")
    write_positions(ENGINE, config)


def _check_layout(plan: ModelPlan, layout: ResolvedLayout, virtual_stages: int | None) -> None:
    """Raises: ConfigError for sizes that Megatron cannot cut, or cuts with a remainder."""
    config = plan.config
    check_tensor_parallel(config, layout.tp)
    if config.vocab_size % layout.tp:
        raise ConfigError(
            f"layout.tp={layout.tp} does not divide model.vocab_size={config.vocab_size} in {ENGINE}, "
            "allowed: a divisor of it, or a larger model.vocab_size"
        )
    stages = layout.pp * (virtual_stages or 1)
    if virtual_stages is not None and layout.pp == 1:
        raise ConfigError(f"engine.virtual_stages={virtual_stages} with layout.pp=1, allowed: null")
    if config.layers % stages:
        raise ConfigError(
            f"layout.pp={layout.pp} x {virtual_stages or 1} stages do not divide model.layers={config.layers} in "
            f"{ENGINE}, allowed: divisors of it"
        )
    if config.tie_embeddings and layout.pp > 1:
        raise ConfigError(f"model.tie_embeddings=true with layout.pp={layout.pp}, allowed: false, or layout.pp=1")
    if layout.dp_shard > 1:
        raise ConfigError(
            f"layout.dp_shard={layout.dp_shard} is not what {ENGINE} does, allowed: 1 (its distributed optimizer cuts "
            "the optimizer's state over all data parallel ranks)"
        )
    if plan.is_moe:
        with torch.device("meta"):
            check_experts(plan.make_experts(), layout.etp)
    elif layout.ep * layout.etp > 1:
        raise ConfigError(f"layout.ep={layout.ep}, layout.etp={layout.etp} without experts, allowed: 1")
