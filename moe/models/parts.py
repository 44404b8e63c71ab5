"""The two halves of a block, made from a model's configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import nn

from ...kernels import ConfigError
from ...parallel.dispatchers import Dispatcher
from ..adapters import AdapterExperts
from ..blocks import MLP, Attention, GatedMLP, MultiHeadLatentAttention, SelfAttention
from ..experts import Experts
from ..layer import MoELayer
from ..routers.base import Router
from .config import ModelConfig


def make_attention(config: ModelConfig, layer: int, group: dist.ProcessGroup | None) -> SelfAttention:
    window = config.window_of(layer)
    if config.latent_attention is not None:
        return MultiHeadLatentAttention(
            config.width,
            config.heads,
            config.latent_attention,
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            logit_factor=1.0 if config.rope_scaling is None else config.rope_scaling.latent_factor,
            window=window,
            group=group,
        )
    return Attention(
        config.width,
        config.heads,
        config.num_kv_heads,
        config.head_size,
        config.qk_norm,
        config.attention_bias,
        window,
        config.norm_eps,
        group,
        config.attention_output_bias,
        config.attention_sinks,
    )


def make_mlp(
    config: ModelConfig,
    layer: int,
    router: Callable[[], Router] | None,
    experts: Callable[[], Experts | AdapterExperts] | None,
    dispatcher: Dispatcher | None,
    group: dist.ProcessGroup | None,
) -> nn.Module:
    if not config.is_moe(layer):
        assert config.ffn_width is not None  # the config has checked it
        return MLP(config.width, config.ffn_width, config.activation, group)
    if router is None or experts is None:
        raise ConfigError(f"layer {layer} is a MoE layer, but no router or experts were given")
    shared = None
    if config.shared_expert_width is not None:
        kind = GatedMLP if config.shared_expert_gate else MLP
        shared = kind(config.width, config.shared_expert_width, config.activation, group)
    made = experts()
    made.share(group)
    return MoELayer(router(), made, shared, dispatcher, index=layer)
