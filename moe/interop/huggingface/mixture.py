"""What their mixtures of experts share: router settings, patterns of layers, tensors of a MoE layer.

The balance loss is not the same number on both sides. Theirs counts the assignments of all layers together and lets
f sum to K: it is coefficient * K for a balanced load, and layers may make up for each other. Ours is taken in each
layer, with f summing to one: coefficient for a balanced load, added up over the layers. The coefficient goes over as
it is, so that it comes back as it was. It matters in training alone, as do z-loss, jitter and the capacity in training,
which are left out where they have no key for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...build import ModelPlan
from ...models.config import ModelConfig
from ...routers.top_k import TopKRouter
from .config_json import ConfigJson
from .decoder import DISPATCHER, TOP_K, attention_rules, experts_node, mlp_rules, outer_rules
from .misfit import completed
from .tensor_rules import TensorRule, filled, gated_experts, same, stacked_experts

COUNTS = ("num_experts", "num_local_experts")  # readers look for one or the other, so both are written
MIXTURE_DEFAULTS: Mapping[str, Any] = {"num_experts": None, "num_local_experts": None, "router_aux_loss_coef": 0.001}
LAYER_DEFAULTS: Mapping[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": None}


def read_num_experts(hf: ConfigJson, key: str) -> int:
    """E, by whichever of the two names it goes.

    Args:
        key: the name that the architecture itself uses, where its default is.
    """
    return hf.one_of(key, *COUNTS, least=2)


def mixture_groups(model: Mapping[str, Any], router: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of a model with experts."""
    return {
        "model": dict(model),
        "router": dict(router),
        "experts": experts_node(model.get("activation", "swiglu")),
        "dispatcher": {"_target_": DISPATCHER},
    }


def read_router(hf: ConfigJson, renormalise: bool, **settings: Any) -> dict[str, Any]:
    """The `router` group of a softmax router."""
    balance = hf.real("router_aux_loss_coef")
    losses = {"balance_micro_batch": balance} if balance else {}
    top_k = hf.whole("num_experts_per_tok", 1)
    return {"_target_": TOP_K, "top_k": top_k, "renormalise": renormalise, **losses, **settings}


def write_mixture(config: ModelConfig, router: Mapping[str, Any]) -> dict[str, Any]:
    """The number of experts by both names, and what a router says, of which they all have keys."""
    return {
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": router["top_k"],
        "router_aux_loss_coef": router["balance_micro_batch"],
    }


def renormalised(router: Mapping[str, Any]) -> bool:
    """Whether the weights of a token sum to one; a softmax over the chosen logits is a renormalised softmax."""
    return router["renormalise"] or router["score"] == "softmax_after"


def read_layer_pattern(hf: ConfigJson, layers: int) -> dict[str, Any]:
    """Which layers have experts: each decoder_sparse_step-th one that is not among mlp_only_layers."""
    every, dense = hf.whole("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(one, bool) or not isinstance(one, int) for one in dense):
        raise hf.refusal("mlp_only_layers", "a list of layers, counting from 0")
    dense = sorted(set(dense) & set(range(layers)))
    pattern = {"moe_every": every} if every > 1 else {}
    if dense == list(range(len(dense))):
        return {**pattern, "first_k_dense": len(dense)} if dense else pattern
    return {"moe_layers": [layer for layer in range(layers) if (layer + 1) % every == 0 and layer not in dense]}


def write_layer_pattern(plan: ModelPlan) -> dict[str, Any]:
    """The same as their keys."""
    config = plan.config
    if config.moe_layers is None:
        return {"decoder_sparse_step": config.moe_every, "mlp_only_layers": list(range(config.first_k_dense))}
    dense = [layer for layer in range(config.layers) if not config.is_moe(layer)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def routed_rules(
    plan: ModelPlan, layer: int, old: str = "mlp", parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> list[TensorRule]:
    """Router and experts of one layer.

    Args:
        old: what the module is called where experts have a key each; in the fused layout it is `mlp`.
        parts: gate, up and down projection of one expert.
    """
    ours, theirs = f"blocks.{layer}.mlp", f"model.layers.{layer}"
    num_experts = plan.config.num_experts
    modules = [f"{theirs}.{old}", f"{theirs}.mlp"][: 1 if old == "mlp" else 2]
    prefixes = [f"{module}.experts" for module in modules]
    return [
        same(f"{ours}.router.weight", f"{modules[0]}.gate.weight", fused=f"{theirs}.mlp.gate.weight"),
        gated_experts(f"{ours}.experts.w_in", prefixes, num_experts, *parts[:2]),
        stacked_experts(f"{ours}.experts.w_out", prefixes, num_experts, parts[2]),
        *balance_rules(plan, layer),
    ]


def balance_rules(plan: ModelPlan, layer: int) -> list[TensorRule]:
    """The load of the last step, which only training uses and they do not have."""
    if not completed(TopKRouter, plan.router)["balance_global_batch"]:
        return []
    num_experts = plan.config.num_experts
    return [filled(f"blocks.{layer}.mlp.router.losses.balance_global_batch.load", (num_experts,), 1.0 / num_experts)]


def mixture_rules(
    plan: ModelPlan, old: str = "mlp", parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Sequence[TensorRule]:
    """All of a model in which a layer has an MLP or experts, none of them shared; arguments as of `routed_rules`."""
    before, after = outer_rules(plan.config)
    layers = []
    for layer in range(plan.config.layers):
        layers += attention_rules(plan.config, layer)
        if plan.config.is_moe(layer):
            layers += routed_rules(plan, layer, old, parts)
        else:
            layers += mlp_rules(f"blocks.{layer}.mlp", f"model.layers.{layer}.mlp")
    return [*before, *layers, *after]
