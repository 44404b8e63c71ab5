"""From a configuration (plain mappings) to the model it describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import ConfigError
from .components import build, check
from .experts import Experts
from .models.config import ModelConfig
from .models.counts import ModelCounts, count_model
from .models.transformer import Transformer
from .routers.base import Router


@dataclass(frozen=True)
class ModelPlan:
    """A checked description of a model, from which it can be built or counted without memory."""

    config: ModelConfig
    router: Mapping[str, Any]
    experts: Mapping[str, Any]
    dispatcher: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], vocab_size: int | None = None) -> ModelPlan:
        """Read the `model`, `router`, `experts` and `dispatcher` nodes.

        Args:
            vocab_size: of the tokenizer; used where model.vocab_size is null, and must fit where it is given.

        Raises: ConfigError that names the field, the value and what is allowed.
        """
        node = dict(config["model"])
        given = node.get("vocab_size")
        if given is None:
            node["vocab_size"] = vocab_size
        elif vocab_size is not None and isinstance(given, int) and given < vocab_size:
            raise ConfigError(
                f"model.vocab_size={given} is smaller than the tokenizer's vocabulary, allowed: {vocab_size} or more"
            )
        if node["vocab_size"] is None:
            raise ConfigError("model.vocab_size=null needs a tokenizer to take it from, allowed: a number")
        model = check(ModelConfig, node, "model")
        plan = cls(model, config["router"], config["experts"], config["dispatcher"])
        if plan.is_moe:
            plan.counts()  # builds a router and experts on the meta device, which checks their settings
            build(plan.dispatcher, "dispatcher")
        return plan

    @property
    def is_moe(self) -> bool:
        return any(self.config.is_moe(layer) for layer in range(self.config.layers))

    def counts(self, sequence_length: int | None = None) -> ModelCounts:
        """Parameters and FLOPs. Active experts of a token: K of a top-k router, the upper bound of another.

        Args:
            sequence_length: for the attention term of the FLOPs; None for model.max_positions.
        """
        if not self.is_moe:
            return count_model(self.config, sequence_length=sequence_length)
        with torch.device("meta"):
            router, experts = self.make_router(), self.make_experts()
        return count_model(
            self.config,
            router.max_experts_per_token,
            experts.activation,
            sequence_length,
            router_parameters=sum(parameter.numel() for parameter in router.parameters()),
        )

    def make_router(self) -> Router:
        return build(self.router, "router", width=self.config.width, num_experts=self.config.num_experts)

    def make_experts(self) -> Experts:
        return build(
            self.experts,
            "experts",
            num_experts=self.config.num_experts,
            width=self.config.width,
            expert_width=self.config.expert_width,
        )

    def make_model(self, checkpointing: str = "none") -> Transformer:
        """The model, on the device of the surrounding `torch.device` context (meta for no memory)."""
        return Transformer(
            self.config,
            router=self.make_router,
            experts=self.make_experts,
            dispatcher=build(self.dispatcher, "dispatcher") if self.is_moe else None,
            checkpointing=checkpointing,
        )
