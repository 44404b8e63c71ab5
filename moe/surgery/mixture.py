"""A stored mixture of experts as surgery sees it: what runs over the experts, and what their number is tied to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels import ConfigError
from ...parallel.checkpoint.lazy import LazyTensor
from ..adapters import AdapterExperts
from ..build import ModelPlan
from ..experts import Experts
from ..interop.stored import StoredModel
from ..routers.base import Router
from ..routers.threshold import ThresholdRouter
from ..routers.top_k import TopKRouter

Change = Callable[[int, str, LazyTensor], LazyTensor]


@dataclass(frozen=True)
class Mixture:
    """A stored model with experts, its router and its experts, which hold no values.

    Attributes:
        layers: numbers of the MoE layers.
        pools: the experts among which some may be exchanged for others: those of each group of a group-limited router,
            else all.
    """

    stored: StoredModel
    plan: ModelPlan
    router: TopKRouter | ThresholdRouter
    experts: Experts | AdapterExperts

    @classmethod
    def of(cls, stored: StoredModel) -> Mixture:
        """Raises: ConfigError if the model has no experts, or a router of which it is not known how to cut it."""
        plan = stored.plan()
        if not plan.is_moe:
            raise ConfigError(
                f"model.num_experts={plan.config.num_experts} of {stored.source} is a dense model, allowed: a mixture "
                "of experts, which scatterfold upcycle makes of it"
            )
        with torch.device("meta"):
            router, experts = plan.make_router(), plan.make_experts()
        if not isinstance(router, TopKRouter | ThresholdRouter) or type(router) not in (TopKRouter, ThresholdRouter):
            raise ConfigError(
                f"router._target_={plan.router['_target_']} cannot be given other experts, allowed: TopKRouter, "
                "ThresholdRouter"
            )
        if not isinstance(experts, Experts | AdapterExperts):
            raise ConfigError(
                f"experts._target_={plan.experts['_target_']} cannot be cut, allowed: Experts, AdapterExperts"
            )
        return cls(stored, plan, router, experts)

    @property
    def num_experts(self) -> int:
        return self.plan.config.num_experts

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.plan.moe_layers)

    @property
    def pools(self) -> list[range]:
        count = self.router.num_groups if isinstance(self.router, TopKRouter) else 1
        size = self.num_experts // count
        return [range(first, first + size) for first in range(0, self.num_experts, size)]

    def per_pool(self, number: int, field: str) -> int:
        """How many of `number` experts are in each pool. Raises: ConfigError if it does not divide."""
        count = len(self.pools)
        if number % count:
            raise ConfigError(
                f"{field}={number} does not divide over router.num_groups={count}, allowed: a multiple of {count}"
            )
        return number // count

    def per_expert(self, layer: int) -> dict[str, LazyTensor]:
        """Tensors of a MoE layer whose dimension 0 runs over the experts, by their names within the layer."""
        prefix = f"blocks.{layer}.mlp."
        names = {name.removeprefix(prefix): t for name, t in self.stored.tensors.items() if name.startswith(prefix)}
        return {name: tensor for name, tensor in names.items() if _runs_over_experts(name)}

    @property
    def stack(self) -> str:
        """What names of the stacked matrices begin with, within a MoE layer."""
        return "experts.adapters." if isinstance(self.experts, AdapterExperts) else "experts."

    def rebuilt(self, config: Mapping[str, Any], change: Change) -> StoredModel:
        """The model of another config, `change` made of each tensor that runs over experts; all else is as it was.

        Args:
            change: (layer, name within the layer, tensor) -> the tensor of the new experts.
        """
        changed = {
            f"blocks.{layer}.mlp.{name}": change(layer, name, tensor)
            for layer in self.layers
            for name, tensor in self.per_expert(layer).items()
        }
        tensors = {name: changed.get(name, tensor) for name, tensor in self.stored.tensors.items()}
        return self.stored.with_model(config, tensors)

    def config_of(self, num_experts: int, **router: Any) -> dict[str, Any]:
        """The config with another number of experts and other values of the router.

        Raises: ConfigError that names the first field that does not fit.
        """
        config = dict(self.stored.config)
        config["model"] = {**config["model"], "num_experts": num_experts}
        config["router"] = {**config["router"], **router}
        ModelPlan.from_config(config)
        return config

    def lowered(self, num_experts: int, top_k: int | None) -> dict[str, Any]:
        """Values of the router for fewer experts: how many a token takes is lowered where it must be.

        Args:
            top_k: asked for; None for as many as before, or all that there are.
        """
        router = self.router
        if isinstance(router, ThresholdRouter):
            most = min(top_k or router.max_experts, num_experts)
            return {"max_experts": most} if top_k is not None or router.max_experts > num_experts else {}
        open_to_one = num_experts // router.num_groups * router.top_groups
        values: dict[str, Any] = {"top_k": min(router.top_k, open_to_one) if top_k is None else top_k}
        if self.stored.config["router"].get("eval_top_k") is not None:
            values["eval_top_k"] = min(router.eval_top_k, open_to_one)
        return {**values, **self.meaning()}

    def meaning(self) -> dict[str, Any]:
        """What a null of the router stands for now, and must go on to stand for with another top_k."""
        router = self.router
        given = self.stored.config["router"].get("renormalise")
        return {"renormalise": router.renormalise} if isinstance(router, TopKRouter) and given is None else {}

    @property
    def weights_sum(self) -> float | None:
        """What the combine weights of a token add up to; None if that varies."""
        router = self.router
        fixed = router.renormalise or (isinstance(router, TopKRouter) and _is_softmax_after(router))
        return router.scale if fixed else None

    @property
    def experts_per_token(self) -> int:
        return self.router.max_experts_per_token


def _is_softmax_after(router: Router) -> bool:
    return type(router.score).__name__ == "SoftmaxAfter"


def _runs_over_experts(name: str) -> bool:
    return name.startswith("router.") or (name.startswith("experts.") and not name.startswith("experts.ffn."))
