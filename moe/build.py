"""From a configuration (plain mappings) to the model it describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import ConfigError
from ..parallel.dispatchers import Dispatcher
from ..parallel.meshes import ALONE, Meshes
from ..parallel.pipeline.stages import PipelineSchedule, split_layers
from .adapters import AdapterExperts
from .components import build, check
from .experts import Experts
from .models.config import ModelConfig
from .models.counts import ModelCounts, count_model, layer_costs
from .models.frozen import check_frozen
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
            plan.make_dispatcher()
        if model.frozen:
            check_frozen(plan._outline(), model.frozen)
        return plan

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the MoE layers."""
        return [layer for layer in range(self.config.layers) if self.config.is_moe(layer)]

    @property
    def is_moe(self) -> bool:
        return bool(self.moe_layers)

    def counts(self, sequence_length: int | None = None) -> ModelCounts:
        """Parameters and FLOPs. Active experts of a token: K of a top-k router, the upper bound of another.

        Args:
            sequence_length: for the attention term of the FLOPs; None for model.max_positions.
        """
        return count_model(
            self.config, sequence_length=sequence_length, frozen_active=self._frozen_active(), **self._active()
        )

    def split(self, stages: int, sequence_length: int | None = None) -> list[range]:
        """The layers of each pipeline stage, so that all have about as much to compute, the head included.

        Raises: ConfigError for more stages than layers.
        """
        costs, head = layer_costs(self.config, sequence_length=sequence_length, **self._active())
        return split_layers(costs, stages, last=head)

    def _active(self) -> dict[str, Any]:
        """What counts of a MoE layer, as arguments of `models.counts`."""
        if not self.is_moe:
            return {}
        with torch.device("meta"):
            router, experts = self.make_router(), self.make_experts()
        return {
            "experts_per_token": router.max_experts_per_token,
            "expert_activation": experts.activation,
            "router_parameters": sum(parameter.numel() for parameter in router.parameters()),
            "expert_bias": experts.b_in is not None,
            "adapter_width": experts.expert_width if isinstance(experts, AdapterExperts) else None,
        }

    def _outline(self) -> Transformer:
        """The whole model of one process, without memory."""
        with torch.device("meta"):
            return self.make_model()

    def _frozen_active(self) -> float:
        """Parameters in matrix products of one token that are not trained, of experts the share that a token uses."""
        with torch.device("meta"):
            trains_experts = not self.is_moe or all(p.requires_grad for p in self.make_experts().parameters())
        if trains_experts and not self.config.frozen:
            return 0.0
        model, share = self._outline(), {}
        for _, layer in model.moe_layers():
            active = min(layer.router.max_experts_per_token, self.config.num_experts) / self.config.num_experts
            share |= {id(parameter): active for parameter in layer.experts.stacked.parameters()}
        if model.embedding is not None and not self.config.tie_embeddings:
            share[id(model.embedding.weight)] = 0.0  # looked up
        return sum(share.get(id(p), 1.0) * p.numel() for p in model.parameters() if not p.requires_grad)

    def make_router(self) -> Router:
        return build(self.router, "router", width=self.config.width, num_experts=self.config.num_experts)

    def make_experts(self) -> Experts | AdapterExperts:
        return build(
            self.experts,
            "experts",
            num_experts=self.config.num_experts,
            width=self.config.width,
            expert_width=self.config.expert_width,
        )

    def make_dispatcher(self, meshes: Meshes = ALONE) -> Dispatcher:
        return build(self.dispatcher, "dispatcher", meshes=meshes)

    def make_model(
        self,
        checkpointing: str = "none",
        meshes: Meshes = ALONE,
        layers: Sequence[int] | None = None,
        context_attention: str = "gather",
        activation_offload: bool = False,
    ) -> Transformer:
        """The model, or its part with these layers, on the device of the surrounding `torch.device` context.

        Args:
            checkpointing: none, full or selective, as described at `Block`.
            meshes: this rank's place, which the model is built for.
            layers: consecutive layers of one part; None for all.
            context_attention, activation_offload: as described at `Transformer`.
        """
        return Transformer(
            self.config,
            router=self.make_router,
            experts=self.make_experts,
            dispatcher=self.make_dispatcher(meshes) if self.is_moe else None,
            checkpointing=checkpointing,
            meshes=meshes,
            layers=layers,
            context_attention=context_attention,
            activation_offload=activation_offload,
        )

    def make_parts(
        self,
        schedule: PipelineSchedule,
        checkpointing: str = "none",
        meshes: Meshes = ALONE,
        sequence_length: int | None = None,
        **options: Any,
    ) -> list[Transformer]:
        """What this rank holds of the model: all of it without a pipeline, else its stages in order.

        Args:
            schedule: says which stages are whose.
            sequence_length: for the cost of attention, by which layers are split.
            options: as of `make_model`.
        """
        pp = meshes.layout.pp
        split = self.split(schedule.stages(pp), sequence_length)
        held = schedule.stages_of(meshes.coordinates.pp, pp)
        return [self.make_model(checkpointing, meshes, split[stage], **options) for stage in held]
