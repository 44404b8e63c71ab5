"""The router of Megatron's MoE layers, as fields of its TransformerConfig."""

from __future__ import annotations

from typing import Any

from ...build import ModelPlan
from ..huggingface.config_json import ConfigJson
from ..huggingface.misfit import Misfit, demand_router

NAME = "megatron"
_TOP_K = "scatterfold.moe.routers.TopKRouter"
_BALANCE = {
    "aux_loss": "balance_micro_batch",
    "seq_aux_loss": "balance_sequence",
    "global_aux_loss": "balance_global_batch",
}


def read_router(fields: ConfigJson) -> dict[str, Any]:
    """The `router` group.

    Softmax after top-k, their default, is our softmax_after; a sigmoid router always renormalises, but for top_k = 1.

    Raises: CheckpointError for what we do not have.
    """
    top_k = fields.whole("moe_router_topk", 1)
    score = fields.only("moe_router_score_function", "softmax", "sigmoid") or "softmax"
    pre = fields.flag("moe_router_pre_softmax")
    router: dict[str, Any] = {"_target_": _TOP_K, "top_k": top_k}
    if score == "sigmoid":
        router |= {"score": "sigmoid", "renormalise": top_k > 1}
    else:
        router |= {"score": "softmax" if pre else "softmax_after", "renormalise": False}
    if fields.get("moe_router_topk_scaling_factor"):
        router["scale"] = fields.real("moe_router_topk_scaling_factor")
    groups = fields.whole_or_none("moe_router_num_groups", 1)
    if groups is not None and groups > 1 and fields.get("moe_router_group_topk"):
        best = fields.whole("moe_router_group_topk", 1)
        counted = top_k // best
        if counted not in (1, 2):
            raise fields.refusal(
                "moe_router_group_topk", f"{top_k} or {top_k // 2}: a group's best expert, or two best"
            )
        router |= {"num_groups": groups, "top_groups": best, "group_score": ("max", "top2_sum")[counted - 1]}
    if fields.flag("moe_router_enable_expert_bias"):
        router["bias_rate"] = fields.real("moe_router_bias_update_rate")
    if fields.flag("add_bias_linear"):
        router["gate_bias"] = True
    for field, ours in (("moe_z_loss_coeff", "z_loss"), ("moe_input_jitter_eps", "jitter")):
        if fields.get(field):
            router[ours] = fields.real(field)
    return router | _read_balance(fields)


def _read_balance(fields: ConfigJson) -> dict[str, float]:
    kinds, rates = fields.get("moe_router_load_balancing_type"), fields.get("moe_aux_loss_coeff")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    rates = rates if isinstance(rates, list) else [rates] * len(kinds)
    read: dict[str, float] = {}
    for kind, rate in zip(kinds, rates):
        if kind not in (*_BALANCE, "none", None):
            raise fields.refusal("moe_router_load_balancing_type", f"{', '.join(_BALANCE)}, none")
        if kind in _BALANCE and rate:
            read[_BALANCE[kind]] = float(rate)
    return read


def write_router(plan: ModelPlan) -> dict[str, Any]:
    """The fields of a top-k router.

    Raises: Misfit for what they do not have.
    """
    scores = ("softmax", "sigmoid", "softmax_after")
    free = dict.fromkeys(("scale", "num_groups", "gate_bias", "bias_rate"), ...)
    router = demand_router(NAME, plan, scores, **free)
    top_k, score, renormalise = router["top_k"], router["score"], router["renormalise"]
    after = score == "softmax_after" or (score == "softmax" and renormalise)
    if score == "sigmoid" and renormalise != (top_k > 1):
        raise Misfit(NAME, "router.renormalise", renormalise, f"{str(top_k > 1).lower()} with sigmoid, top_k={top_k}")
    if after and top_k == 1:
        raise Misfit(NAME, "router.renormalise", renormalise, "false with top_k=1, and score=softmax")
    if router["bias_rate"] is not None and score != "sigmoid":
        raise Misfit(NAME, "router.bias_rate", router["bias_rate"], f"null with score={score}, or score=sigmoid")
    fields: dict[str, Any] = {
        "moe_router_topk": top_k,
        "moe_router_score_function": "sigmoid" if score == "sigmoid" else "softmax",
        "moe_router_pre_softmax": score == "softmax" and not after,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": router["bias_rate"] is not None,
    }
    if router["bias_rate"] is not None:
        fields["moe_router_bias_update_rate"] = router["bias_rate"]
    if router["scale"] != 1.0:
        fields["moe_router_topk_scaling_factor"] = router["scale"]
    if router["num_groups"] > 1:
        counted = {"max": 1, "top2_sum": 2}[router["group_score"]]
        if top_k // router["top_groups"] != counted or (counted == 2 and score == "softmax" and after):
            allowed = f"max with top_groups={top_k}, or top2_sum with top_groups={top_k // 2} and score=sigmoid"
            raise Misfit(NAME, "router.group_score", router["group_score"], allowed)
        fields |= {"moe_router_num_groups": router["num_groups"], "moe_router_group_topk": router["top_groups"]}
    balance = {kind: router[ours] for kind, ours in _BALANCE.items() if router[ours]}
    fields["moe_router_load_balancing_type"] = list(balance) if len(balance) > 1 else next(iter(balance), "none")
    fields["moe_aux_loss_coeff"] = list(balance.values()) if len(balance) > 1 else next(iter(balance.values()), 0.0)
    for field, ours in (("moe_z_loss_coeff", "z_loss"), ("moe_input_jitter_eps", "jitter")):
        if router[ours]:
            fields[field] = router[ours]
    return fields
