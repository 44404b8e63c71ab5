"""What is estimated: a configuration, and the layout that it runs in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, comb
from typing import Any

import torch

from ...kernels import ConfigError
from ...parallel.dispatchers import AllGatherDispatcher
from ...parallel.engines import TorchEngine
from ...parallel.layout import Layout, ResolvedLayout
from ...parallel.pipeline.stages import PipelineSchedule
from ..build import ModelPlan
from ..components import target_of
from ..data.batches import Share
from ..experts import Experts
from ..models.config import ModelConfig
from ..models.counts import ModelCounts
from ..routers.base import Router
from ..training.run_plan import RunPlan
from .inventory import Inventory


@dataclass(frozen=True)
class _Remembering(ModelPlan):
    """A model plan for checks of many layouts: it makes a router, experts and a split of the layers only once."""

    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    def make_router(self) -> Router:
        return self._remember("router", super().make_router)

    def make_experts(self) -> Any:
        return self._remember("experts", super().make_experts)

    def split(self, stages: int, sequence_length: int | None = None) -> list[range]:
        return self._remember(
            (stages, sequence_length), lambda: super(_Remembering, self).split(stages, sequence_length)
        )

    def _remember(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            with torch.device("meta"):
                self._known[key] = make()
        return self._known[key]


@dataclass(frozen=True)
class Workload:
    """All of a run's configuration that does not depend on its layout.

    Attributes:
        plan: the checked configuration; its model remembers what it has made, for checks only.
        inventory: the model's parameters.
        counts: parameters and FLOPs, of the whole model.
        experts_per_token: K; the upper bound where tokens take different numbers.
        expert_activation: of the experts.
        router_matrices: tensors of (tokens, E) that a router keeps for its backward pass.
        router_columns: tensors of (tokens, K) float32 that it keeps.
        jitter: whether a router multiplies its input by noise, which it keeps.
        sends_everything: whether every token travels to every rank (dispatcher=all_gather).
        capacity_factor, chunks: of the dispatcher.
        device_type: cpu or cuda: which kernels run.
    """

    plan: RunPlan
    inventory: Inventory
    counts: ModelCounts
    experts_per_token: int = 0
    expert_activation: str = "swiglu"
    experts_recompute: bool = False
    router_matrices: int = 0
    router_columns: int = 0
    jitter: bool = False
    sends_everything: bool = False
    capacity_factor: float | None = None
    chunks: int = 1
    device_type: str = "cpu"

    @classmethod
    def of(cls, plan: RunPlan, device_type: str = "cpu") -> Workload:
        """Raises: ConfigError for what the formulas do not know."""
        if not isinstance(plan.engine, TorchEngine):
            name = type(plan.engine).__name__.removesuffix("Engine").lower()
            raise ConfigError(f"engine={name} is not what the formulas describe, allowed: engine=torch")
        model = plan.model
        _check_attention(model.config)
        remembering = replace(plan, model=_Remembering(model.config, model.router, model.experts, model.dispatcher))
        counts = model.counts(plan.data.sequence_length)
        found = cls(remembering, Inventory.of(model), counts, device_type=device_type)
        if not plan.model.is_moe:
            return found
        with torch.device("meta"):
            router, experts = plan.model.make_router(), plan.model.make_experts()
        if not isinstance(experts, Experts):
            raise ConfigError(
                f"experts._target_={type(experts).__name__} is not what the formulas describe, allowed: experts=default"
            )
        score = plan.model.router.get("score", "softmax")
        return replace(
            found,
            experts_per_token=min(router.max_experts_per_token, plan.model.config.num_experts),
            expert_activation=experts.activation,
            experts_recompute=experts.recompute == "all",
            router_matrices=(1 if score == "softmax" else 2) + ("z_loss" in router.losses),
            router_columns=1 if getattr(router, "renormalise", False) else 0,
            jitter=router.jitter > 0,
            sends_everything=issubclass(target_of(model.dispatcher, "dispatcher"), AllGatherDispatcher),  # type: ignore
            capacity_factor=model.dispatcher.get("capacity_factor"),
            chunks=model.dispatcher.get("chunks") or 1,
        )

    @property
    def config(self) -> ModelConfig:
        return self.plan.model.config

    @property
    def element_bytes(self) -> int:
        """Of what matrix products read and write."""
        return 2 if self.plan.trainer.precision == "bf16" else 4

    @property
    def schedule(self) -> PipelineSchedule:
        return self.plan.engine.schedule

    def resolve(self, layout: Layout, world: int) -> ResolvedLayout:
        """By the rules of training. Raises: ConfigError if ranks, model or batch cannot be cut that way."""
        return replace(self.plan, layout=layout).resolve_layout(world)

    def split(self, stages: int) -> list[range]:
        """The layers of each pipeline stage."""
        return self.plan.model.split(stages, self.plan.data.sequence_length)


def _check_attention(config: ModelConfig) -> None:
    """Raises: ConfigError for attention whose activations the formulas do not count."""
    if config.latent_attention is not None:
        raise ConfigError("model.latent_attention is not what the formulas describe, allowed: null (grouped queries)")
    if config.attention_sinks:
        raise ConfigError("model.attention_sinks=true is not what the formulas describe, allowed: false")


@dataclass(frozen=True)
class Job:
    """A workload in one layout.

    Attributes:
        imbalance: load of the busiest dispatch rank over the mean; 1 for even routing.
    """

    workload: Workload
    layout: ResolvedLayout
    imbalance: float = 1.0
    _known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, computed once for this job; for what several estimates share."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    @cached_property
    def share(self) -> Share:
        data = self.workload.plan.data
        return Share.of(data.global_batch_size, data.micro_batch_size, 0, self.layout.data)

    @property
    def micro_batches(self) -> int:
        return self.share.micro_batches

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        data = self.workload.plan.data
        return data.global_batch_size * data.sequence_length

    @property
    def cp_tokens(self) -> int:
        """Tokens of a micro-batch on one cp rank, of which its tp ranks each compute attention for some heads."""
        return self.share.micro_batch_size * self.workload.plan.data.sequence_length // self.layout.cp

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank, between attention and between MLPs."""
        return self.cp_tokens // self.layout.tp

    @property
    def dispatch_ranks(self) -> int:
        return self.layout.ep * self.layout.etp

    @property
    def by_ddp(self) -> bool:
        """Whether every rank holds the whole model and nothing else, which DDP reduces."""
        layout = self.layout
        return layout.dp_replicate == layout.world > 1 and self.dispatch_ranks == 1

    @property
    def sequence_length(self) -> int:
        """S, of which cp ranks hold a part."""
        return self.workload.plan.data.sequence_length

    def masks_on_cpu(self, layer: int) -> bool:
        """Whether a layer's window is a mask that its attention keeps: where no kernel knows windows."""
        window = self.workload.config.window_of(layer)
        return self.workload.device_type == "cpu" and window is not None and window < self.sequence_length

    @property
    def packs_on_cpu(self) -> bool:
        """Whether attention is computed document by document, and its results joined."""
        return self.workload.device_type == "cpu" and self.workload.plan.data.pack_documents

    @cached_property
    def holders(self) -> float:
        """Distinct ep indices that a token goes to, if K of E experts are drawn evenly.

        An ep index with E / EP experts is missed with probability C(E - E / EP, K) / C(E, K).
        """
        experts, ep, top_k = self.workload.config.num_experts, self.layout.ep, self.workload.experts_per_token
        if self.workload.sends_everything:
            return float(ep)
        return ep * (1 - comb(experts - experts // ep, top_k) / comb(experts, top_k))

    @cached_property
    def rows(self) -> float:
        """R, rows that arrive at a rank for its experts in one micro-batch: as many as leave, if routing is even.

        Each token sends one row to each of the etp ranks of the ep indices that hold its experts. A bounded buffer is
        filled up: every rank sends each other one as many rows as its bound says.
        """
        if self.dispatch_ranks == 1:
            return float(self.tokens)
        if self.workload.capacity_factor is not None and not self.workload.sends_everything:
            return float(min(self._bound, self.tokens) * self.dispatch_ranks)
        spread = self.tokens * self.holders * self.layout.etp
        return (
            spread
            if self.workload.sends_everything
            else min(spread * self.imbalance, self.tokens * self.dispatch_ranks)
        )

    @cached_property
    def assignments(self) -> float:
        """N, (token, expert) pairs whose slice of an expert is on a rank, in one micro-batch."""
        pairs = self.tokens * self.workload.experts_per_token
        if self.dispatch_ranks == 1:
            return float(pairs)
        if self.workload.capacity_factor is not None:
            return float(self._bound * self.dispatch_ranks)
        return pairs * self.layout.etp * self.imbalance

    @property
    def _bound(self) -> int:
        """Assignments that fit from one rank to an ep index (`dispatchers.tables.Limits`)."""
        pairs = self.tokens * self.workload.experts_per_token
        return min(ceil((self.workload.capacity_factor or 1.0) * pairs / self.layout.ep), pairs)

    def parts(self, rank: int) -> list[range]:
        """The layers of each part of the model on a rank of the pipeline."""
        schedule, pp = self.workload.schedule, self.layout.pp

        def make() -> list[range]:
            split = self.workload.split(schedule.stages(pp))
            return [split[stage] for stage in schedule.stages_of(rank, pp)]

        return self.remember(("parts", rank), make)

    def layers(self, rank: int) -> list[int]:
        """The layers on a rank of the pipeline."""
        return [layer for part in self.parts(rank) for layer in part]

    def layers_by_kind(self, rank: int) -> dict[int, list[int]]:
        """The same by their kind in the inventory."""

        def make() -> dict[int, list[int]]:
            found: dict[int, list[int]] = {}
            for layer in self.layers(rank):
                found.setdefault(self.kind(layer), []).append(layer)
            return found

        return self.remember(("kinds", rank), make)

    def has_first(self, rank: int) -> bool:
        return any(0 in part for part in self.parts(rank))

    def has_last(self, rank: int) -> bool:
        return any(self.workload.config.layers - 1 in part for part in self.parts(rank))

    def kind(self, layer: int) -> int:
        """Number of a layer's kind in the inventory."""
        return self.workload.inventory.layers[layer]
