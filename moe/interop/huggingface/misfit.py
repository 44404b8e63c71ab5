"""What an architecture of theirs cannot say about a model of ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ....kernels import ConfigError
from ...build import ModelPlan
from ...components import TARGET, target_of
from ...experts import Experts
from ...routers.top_k import TopKRouter


class Misfit(ConfigError):
    """A field of ours whose value an architecture cannot express."""

    def __init__(self, model_type: str, field: str, value: Any, allowed: str) -> None:
        self.model_type, self.field, self.value = model_type, field, value
        super().__init__(f"{self.named} does not fit {model_type}, allowed: {allowed}")

    @property
    def named(self) -> str:
        """The field and its value."""
        return f"{self.field}={_show(self.value)}"


# What an architecture leaves alone unless it says otherwise: all of it changes what is computed.
PLAIN_MODEL = {
    "qk_norm": "none",
    "attention_bias": False,
    "sliding_window": None,
    "window_layers": None,
    "shared_expert_width": None,
    "latent_attention": None,
    "rotary_width": None,
    "attention_sinks": False,
    "attention_output_bias": False,
}
PLAIN_EXPERTS = {"bias": False}
PLAIN_ROUTER = {  # of what training alone uses (losses, jitter, the capacity in training) there is nothing
    "scale": 1.0,
    "num_groups": 1,
    "gate_bias": False,
    "bias_rate": None,
    "eval_capacity_factor": None,
}


def demand_model(model_type: str, plan: ModelPlan, **others: Any) -> None:
    """Raises: Misfit for the first field of the model that the architecture cannot say.

    Args:
        others: fields that may be anything but their value in `PLAIN_MODEL` (...), or must be this one.
    """
    if not plan.is_moe:  # a dense model has nothing to share, whatever its config says
        others["shared_expert_width"] = ...
    _demand(model_type, "model", lambda field: getattr(plan.config, field), {**PLAIN_MODEL, **others})


def demand_dense(model_type: str, plan: ModelPlan) -> None:
    """Raises: Misfit for a model with experts."""
    if plan.is_moe:
        raise Misfit(model_type, "model.num_experts", plan.config.num_experts, "0")


def demand_experts(model_type: str, plan: ModelPlan, all_layers: bool = False, **others: Any) -> dict[str, Any]:
    """The settings of the experts.

    Args:
        all_layers: every layer must be a MoE layer.
        others: as of `demand_model`, over `PLAIN_EXPERTS`.

    Raises: Misfit for a dense model, other experts than stacked MLPs, or a pattern of layers that does not fit.
    """
    config = plan.config
    if not plan.is_moe:
        raise Misfit(model_type, "model.num_experts", config.num_experts, "2 or more")
    if target_of(plan.experts, "experts") is not Experts:
        raise Misfit(model_type, f"experts.{TARGET}", plan.experts[TARGET], "scatterfold.moe.Experts")
    settings = completed(Experts, plan.experts)
    _demand(model_type, "experts", settings.__getitem__, {**PLAIN_EXPERTS, **others})
    if all_layers and len(plan.moe_layers) < config.layers:
        dense = next(layer for layer in range(config.layers) if not config.is_moe(layer))
        raise Misfit(model_type, "model.moe_layers", plan.moe_layers, f"all layers (layer {dense} is dense)")
    return settings


def demand_router(model_type: str, plan: ModelPlan, scores: tuple[str, ...], **others: Any) -> dict[str, Any]:
    """The settings of a top-k router.

    Args:
        scores: kinds of score that the architecture has.
        others: as of `demand_model`, over `PLAIN_ROUTER`.

    Raises: Misfit for another router, or a setting that changes what is computed in evaluation and that they lack.
    """
    if target_of(plan.router, "router") is not TopKRouter:
        raise Misfit(model_type, f"router.{TARGET}", plan.router[TARGET], "scatterfold.moe.routers.TopKRouter")
    settings = completed(TopKRouter, plan.router)
    if settings["renormalise"] is None:
        settings["renormalise"] = settings["top_k"] > 1
    if settings["eval_top_k"] not in (None, settings["top_k"]):
        raise Misfit(model_type, "router.eval_top_k", settings["eval_top_k"], f"null, {settings['top_k']}")
    if settings["score"] not in scores:
        raise Misfit(model_type, "router.score", settings["score"], ", ".join(scores))
    _demand(model_type, "router", settings.__getitem__, {**PLAIN_ROUTER, **others})
    return settings


def completed(cls: type, node: Mapping[str, Any]) -> dict[str, Any]:
    """A node with the defaults of its class for what it does not say."""
    parameters = inspect.signature(cls).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    return {**defaults, **{key: value for key, value in node.items() if key != TARGET}}


def hidden_activation(model_type: str, plan: ModelPlan) -> str:
    """The one activation of all MLPs of a model, as `hidden_act` names it.

    Raises: Misfit if experts and other MLPs differ, or it is not gated.
    """
    config = plan.config
    used = {}
    if len(plan.moe_layers) < config.layers or config.shared_expert_width is not None:
        used["model.activation"] = config.activation
    if plan.is_moe:
        used["experts.activation"] = completed(Experts, plan.experts)["activation"]
    for field, activation in used.items():
        if activation not in HIDDEN_ACTS.values():
            raise Misfit(model_type, field, activation, ", ".join(sorted(set(HIDDEN_ACTS.values()))))
    if len(set(used.values())) > 1:
        raise Misfit(model_type, "experts.activation", used["experts.activation"], used["model.activation"])
    activation = next(iter(used.values()))
    return next(name for name, ours in HIDDEN_ACTS.items() if ours == activation)


HIDDEN_ACTS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}


def _demand(model_type: str, group: str, get: Callable[[str], Any], allowed: Mapping[str, Any]) -> None:
    for field, value in allowed.items():
        if value is not ... and get(field) != value:
            raise Misfit(model_type, f"{group}.{field}", get(field), _show(value))


def _show(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, tuple):
        return str(list(value))
    return str(value) if isinstance(value, (int, float, str, list)) else repr(value)
