"""Parameters and floating-point operations of a model, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels import is_gated
from ..blocks.latent_attention import LatentAttention
from .config import ModelConfig


@dataclass(frozen=True)
class ModelCounts:
    """Sizes of a model.

    Attributes:
        total: all parameters.
        active: parameters that one token uses; of the experts, those it is routed to.
        embedding: of these, the token table (which a lookup reads and no matrix product), and the head if tied to it.
        flops_per_token: floating-point operations of forward and backward, as `flops_per_token` counts them.
    """

    total: int
    active: int
    embedding: int
    flops_per_token: float


def count_model(
    config: ModelConfig,
    experts_per_token: int = 0,
    expert_activation: str = "swiglu",
    sequence_length: int | None = None,
    router_parameters: int | None = None,
    expert_bias: bool = False,
    adapter_width: int | None = None,
    frozen_active: float = 0.0,
) -> ModelCounts:
    """Count a model without building it.

    Args:
        experts_per_token: K; experts that count as active.
        expert_activation: of the experts; a gated one has three matrices, another two.
        sequence_length: S for the attention term of the FLOPs; None for model.max_positions.
        router_parameters: of one router; None for E x D, a gate without bias.
        expert_bias: whether experts have biases, one before the activation and one of the output.
        adapter_width: of experts that are adapters on the output of one MLP (`moe.adapters`); None for others.
        frozen_active: of the active parameters in matrix products, those that are not trained.
    """
    moe_layers = sum(config.is_moe(layer) for layer in range(config.layers))
    if router_parameters is None:
        router_parameters = config.num_experts * config.width
    total = active = _embedding(config) + _head(config) + config.width  # and the final norm
    shared_by_all = config.layers * (_attention(config) + 2 * config.width)
    shared_by_all += (config.layers - moe_layers) * _mlp(config, config.ffn_width, config.activation)
    common = _common(config, expert_activation, adapter_width)
    shared_by_all += moe_layers * (router_parameters + _shared_expert(config) + common)
    expert = _expert(config, expert_activation, expert_bias, adapter_width)
    total += shared_by_all + moe_layers * config.num_experts * expert
    active += shared_by_all + moe_layers * min(experts_per_token, config.num_experts) * expert
    flops = flops_per_token(config, active, sequence_length or config.max_positions, frozen_active)
    return ModelCounts(total=total, active=active, embedding=_embedding(config), flops_per_token=flops)


def layer_costs(
    config: ModelConfig,
    experts_per_token: int = 0,
    expert_activation: str = "swiglu",
    sequence_length: int | None = None,
    router_parameters: int | None = None,
    expert_bias: bool = False,
    adapter_width: int | None = None,
) -> tuple[list[float], float]:
    """Floating-point operations of one token in each layer, and in the head, by the rule of `flops_per_token`.

    By these a pipeline splits the layers. The embedding is a lookup and counts nothing, frozen parameters count as
    trained ones. Arguments as of `count_model`.
    """
    if router_parameters is None:
        router_parameters = config.num_experts * config.width
    expert = _expert(config, expert_activation, expert_bias, adapter_width)
    moe = router_parameters + _shared_expert(config) + _common(config, expert_activation, adapter_width)
    moe += min(experts_per_token, config.num_experts) * expert
    dense = _mlp(config, config.ffn_width, config.activation)
    costs = []
    for layer in range(config.layers):
        weights = _attention(config) + 2 * config.width + (moe if config.is_moe(layer) else dense)
        costs.append(6.0 * weights + _attention_flops(config, sequence_length or config.max_positions, layer))
    return costs, 6.0 * config.width * (config.vocab_size + 1)


def flops_per_token(config: ModelConfig, active: int, sequence_length: int, frozen: float = 0.0) -> float:
    """Floating-point operations of one token's forward and backward pass: 6 N - 2 Z + 12 L H W C.

    - N: active parameters but for the token table, which is looked up; a tied table counts once, as the head. Each
      costs one multiplication and one addition forward, and twice that backward (2001.08361, section 2.1).
    - Z: those of them that are frozen, whose gradient is not computed. That of their input is counted, also where
      nothing before them is trained.
    - L layers of H heads of width W: queries times keys, and probabilities times values, are 2 W operations each for
      each of the C tokens that a token sees; times three for forward and backward. Latent attention has keys and
      values of different widths, expanded as in training, and W is their mean.
    - C = (S + 1) / 2, the mean over a causal sequence of S tokens, or less with a sliding window. Document boundaries
      are not known here and not subtracted.

    Recomputation by activation checkpointing does not count: this is work asked for, not work done.
    """
    in_products = active if config.tie_embeddings else active - _embedding(config)
    attention = sum(_attention_flops(config, sequence_length, layer) for layer in range(config.layers))
    return 6.0 * in_products - 2.0 * frozen + attention


def _attention_flops(config: ModelConfig, sequence_length: int, layer: int) -> float:
    """12 H W C, of one layer: see `flops_per_token`."""
    window = min(config.window_of(layer) or sequence_length, sequence_length)
    seen = (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length
    latent = config.latent_attention
    both = 2 * config.head_size if latent is None else latent.query_width + latent.value_width
    return 6.0 * config.heads * both * seen


def _embedding(config: ModelConfig) -> int:
    return config.vocab_size * config.width


def _head(config: ModelConfig) -> int:
    return 0 if config.tie_embeddings else _embedding(config)


def _attention(config: ModelConfig) -> int:
    if config.latent_attention is not None:
        return _latent_attention(config, config.latent_attention)
    queries = config.heads * config.head_size
    keys = config.num_kv_heads * config.head_size
    biases = queries + 2 * keys if config.attention_bias else 0
    norms = {"none": 0, "head": 2 * config.head_size, "projection": queries + keys}[config.qk_norm]
    biases += config.width if config.attention_output_bias else 0
    sinks = config.heads if config.attention_sinks else 0
    return config.width * (2 * queries + 2 * keys) + biases + norms + sinks


def _latent_attention(config: ModelConfig, latent: LatentAttention) -> int:
    down = latent.kv_rank + latent.rope_width + (latent.q_rank or 0)
    biases = (down if config.attention_bias else 0) + (config.width if config.attention_output_bias else 0)
    norms = latent.kv_rank + (latent.q_rank or 0)
    to_queries = config.heads * latent.query_width * (latent.q_rank or config.width)
    to_keys = config.heads * (latent.nope_width + latent.value_width) * latent.kv_rank
    output = config.heads * latent.value_width * config.width
    return config.width * down + biases + norms + to_queries + to_keys + output


def _mlp(config: ModelConfig, hidden: int | None, activation: str) -> int:
    return config.width * (hidden or 0) * (3 if is_gated(activation) else 2)


def _common(config: ModelConfig, activation: str, adapter_width: int | None) -> int:
    """What the experts of a layer have in common: the MLP under adapters."""
    return 0 if adapter_width is None else _mlp(config, config.expert_width, activation)


def _expert(config: ModelConfig, activation: str, bias: bool, adapter_width: int | None) -> int:
    if adapter_width is not None:
        return 2 * config.width * adapter_width
    width = config.expert_width or 0
    biases = width * (2 if is_gated(activation) else 1) + config.width
    return _mlp(config, width, activation) + (biases if bias else 0)


def _shared_expert(config: ModelConfig) -> int:
    if config.shared_expert_width is None:
        return 0
    gate = config.width if config.shared_expert_gate else 0
    return _mlp(config, config.shared_expert_width, config.activation) + gate
