"""Which of our tensors hold what those of a GPTModel hold, both ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....kernels import is_gated
from ....parallel.checkpoint.lazy import LazyTensor, cat, narrow, pointwise
from ...build import ModelPlan
from ...models.config import ModelConfig
from ..huggingface.mixture import balance_rules
from ..huggingface.tensor_rules import Layout, TensorRule, half, join_rows, linear, mapped, same, split_rows

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def megatron_rules(plan: ModelPlan, zero_centered: bool = False) -> Sequence[TensorRule]:
    """All of a model, in plain names.

    Args:
        zero_centered: norms are stored less one (`layernorm_zero_centered_gamma`).
    """
    config = plan.config
    rules = [same("embedding.weight", EMBEDDING)]
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"decoder.layers.{layer}"
        rules += _attention_rules(config, ours, theirs, zero_centered)
        rules.append(_norm(f"{ours}.mlp_norm.weight", f"{theirs}.pre_mlp_layernorm.weight", zero_centered))
        if config.is_moe(layer):
            rules += [*_moe_rules(plan, f"{ours}.mlp", f"{theirs}.mlp"), *balance_rules(plan, layer)]
        else:
            rules += _mlp_rules(f"{ours}.mlp", f"{theirs}.mlp", config.activation)
    rules.append(_norm("norm.weight", "decoder.final_layernorm.weight", zero_centered))
    return rules if config.tie_embeddings else [*rules, same("head.weight", HEAD)]


def _attention_rules(config: ModelConfig, ours: str, theirs: str, zero_centered: bool) -> list[TensorRule]:
    theirs_attention = f"{theirs}.self_attention"
    rules = [_norm(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", zero_centered)]
    for part in ("weight", "bias") if config.attention_bias else ("weight",):
        names = [f"{ours}.attention.w{name}.{part}" for name in "qkv"]
        rules.append(_grouped_qkv(names, f"{theirs_attention}.linear_qkv.{part}", config))
    rules += linear(f"{ours}.attention.wo", f"{theirs_attention}.linear_proj", config.attention_output_bias)
    if config.attention_sinks:
        rules.append(same(f"{ours}.attention.sinks", f"{theirs_attention}.core_attention.softmax_offset"))
    if config.qk_norm == "head":
        for name in "qk":
            key = f"{theirs_attention}.{name}_layernorm.weight"
            rules.append(_norm(f"{ours}.attention.{name}_norm.weight", key, zero_centered))
    return rules


def _moe_rules(plan: ModelPlan, ours: str, theirs: str) -> list[TensorRule]:
    config = plan.config
    with torch.device("meta"):
        router, experts = plan.make_router(), plan.make_experts()
    rules = [same(f"{ours}.router.weight", f"{theirs}.router.weight")]
    if router.bias is not None:
        rules.append(same(f"{ours}.router.bias", f"{theirs}.router.bias"))
    if getattr(router, "expert_bias", None) is not None:
        rules.append(same(f"{ours}.router.expert_bias", f"{theirs}.router.expert_bias"))
    gated = is_gated(experts.activation)
    for part, letter in (("weight", "w"), ("bias", "b"))[: 1 if experts.b_in is None else 2]:
        first = same(f"{ours}.experts.{letter}_in", f"{theirs}.experts.experts.linear_fc1.{part}")
        rules.append(mapped(first, _split_gate, _join_gate) if gated else first)
        rules.append(same(f"{ours}.experts.{letter}_out", f"{theirs}.experts.experts.linear_fc2.{part}"))
    if config.shared_expert_width is not None:
        rules += _mlp_rules(f"{ours}.shared", f"{theirs}.shared_experts", config.activation)
        if config.shared_expert_gate:
            rules.append(same(f"{ours}.shared.gate.weight", f"{theirs}.shared_experts.gate_weight"))
    return rules


def _mlp_rules(ours: str, theirs: str, activation: str) -> list[TensorRule]:
    key = f"{theirs}.linear_fc1.weight"
    if is_gated(activation):
        layout = Layout(
            (key,),
            lambda theirs: [half(theirs[0], 0, 0), half(theirs[0], 0, 1)],
            lambda ours: [cat(list(ours), 0)],
        )
        first = TensorRule((f"{ours}.w_gate.weight", f"{ours}.w_up.weight"), (layout,))
    else:
        first = same(f"{ours}.w_up.weight", key)
    return [first, same(f"{ours}.w_out.weight", f"{theirs}.linear_fc2.weight")]


def _grouped_qkv(names: Sequence[str], key: str, config: ModelConfig) -> TensorRule:
    """Their rows: of each key-value head its query heads, then its key, then its value."""
    groups, width = config.num_kv_heads, config.head_size
    queries = config.heads // groups * width
    spans = ((0, queries), (queries, width), (queries + width, width))

    def read(theirs: Sequence[LazyTensor]) -> list[LazyTensor]:
        grouped = split_rows(theirs[0], 0, groups)
        return [join_rows(narrow(grouped, 1, start, length), 0) for start, length in spans]

    def write(ours: Sequence[LazyTensor]) -> list[LazyTensor]:
        return [join_rows(cat([split_rows(tensor, 0, groups) for tensor in ours], 1), 0)]

    return TensorRule(tuple(names), (Layout((key,), read, write),))


def _norm(name: str, key: str, zero_centered: bool) -> TensorRule:
    rule = same(name, key)
    if not zero_centered:
        return rule
    return mapped(
        rule,
        lambda theirs: pointwise(theirs, lambda part: part + 1),
        lambda ours: pointwise(ours, lambda part: part - 1),
    )


def _split_gate(theirs: LazyTensor) -> LazyTensor:
    """(E, 2F, …) -> (E, 2, F, …), gate first."""
    return split_rows(theirs, 1, 2)


def _join_gate(ours: LazyTensor) -> LazyTensor:
    return join_rows(ours, 1)
