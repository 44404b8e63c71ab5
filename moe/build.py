"""From a configuration (plain mappings) to the model it describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..kernels import ConfigError
from .components import build, check, target_of
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
            with torch.device("meta"):
                plan.make_router(), plan.make_experts()
            build(plan.dispatcher, "dispatcher")
        return plan

    @property
    def is_moe(self) -> bool:
        return any(self.config.is_moe(layer) for layer in range(self.config.layers))

    @property
    def experts_per_token(self) -> int:
        """Experts that count as active for a token: K of a top-k router, the cap of another, or all."""
        if not self.is_moe:
            return 0
        with torch.device("meta"):
            return self.make_router().max_experts_per_token

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
