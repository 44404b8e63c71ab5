"""The layers of a GPTModel: projections and dense MLPs are Megatron's; norms, attention and MoE layers are ours."""

from __future__ import annotations

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from ..build import ModelPlan
from .layer import MegatronMoELayer
from .parts import CoreAttention, Norm

# Megatron's names for norms in its checkpoints: those of the modules of Transformer Engine that do norm and matrix.
_NORM_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

DENSE = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def decoder_block_spec(
    plan: ModelPlan,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """What GPTModel takes as `transformer_layer_spec`: the layers of one pipeline stage, and the last norm.

    Args:
        plan: our model, which says for each layer whether it is dense.
        config: Megatron's, which splits the layers over stages.
        pg_collection: groups for the MoE layers; None for those of `parallel_state`.
        vp_stage, pp_rank: the stage; None for that of this rank.
    """
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(plan, layer, pg_collection) for layer in stage_layers(config, vp_stage, pp_rank)],
        layer_norm=Norm,  # type: ignore[arg-type]
    )


def stage_layers(config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None) -> range:
    """The layers of a pipeline stage, counting from 0 over the whole model."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank))


def layer_spec(plan: ModelPlan, layer: int, pg_collection: ProcessGroupCollection | None = None) -> ModuleSpec:
    """One TransformerLayer; `layer` counts from 0 over the whole model."""
    head_norm = Norm if plan.config.qk_norm == "head" else IdentityOp
    if plan.config.is_moe(layer):
        params = {"plan": plan, "layer": layer, "pg_collection": pg_collection}
        mlp = ModuleSpec(module=MegatronMoELayer, params=params)
    else:
        mlp = ModuleSpec(module=MLP, submodules=DENSE)
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=partial(CoreAttention, model=plan.config),
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,  # type: ignore[arg-type]
            pre_mlp_layernorm=Norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,  # type: ignore[arg-type]
            sharded_state_dict_keys_map=_NORM_KEYS,
        ),
    )
