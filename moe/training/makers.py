"""Who makes the model that an engine trains: we do, unless the engine brings a kind of model of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ...parallel.engines import EngineChoice
from ...parallel.layout import ResolvedLayout
from ...parallel.meshes import Meshes
from ...parallel.plan import ShardingPlan
from ...parallel.process import Process
from ..build import ModelPlan
from ..sharding import sharding_plan
from .settings import TrainerSettings


@runtime_checkable
class ModelMaker(Protocol):
    """What makes this rank's parts of a model. `parallel` knows no model, so an engine whose schedules need another
    class than ours is chosen by a class of this floor that has these methods, beside those of `EngineChoice`."""

    def check_model(self, model: ModelPlan, trainer: TrainerSettings, layout: ResolvedLayout) -> None:
        """Say before the start what cannot be made. Raises: ConfigError that names the field, and who can."""
        ...

    def make_parts(
        self,
        model: ModelPlan,
        trainer: TrainerSettings,
        *,
        process: Process,
        meshes: Meshes,
        sequence_length: int,
        seed: int,
    ) -> tuple[Sequence[nn.Module], ShardingPlan]:
        """What `prepare` of the engine gets: modules with `moe_layers()`. Every rank must call it."""
        ...


@dataclass(frozen=True)
class TransformerMaker:
    """Our own model, without memory: engines give it values that depend on the seed only."""

    engine: EngineChoice

    def check_model(self, model: ModelPlan, trainer: TrainerSettings, layout: ResolvedLayout) -> None:
        """Nothing: it can be all that a configuration can say."""

    def make_parts(
        self, model: ModelPlan, trainer: TrainerSettings, *, meshes: Meshes, sequence_length: int, **_: Any
    ) -> tuple[Sequence[nn.Module], ShardingPlan]:
        with torch.device("meta"):
            parts = model.make_parts(
                self.engine.schedule,
                trainer.activation_checkpointing,
                meshes,
                sequence_length,
                context_attention=trainer.context_attention,
                activation_offload=trainer.activation_offload,
            )
        return parts, sharding_plan(parts)


def maker_of(engine: EngineChoice) -> ModelMaker:
    """The engine itself, if it makes models, or our own."""
    return engine if isinstance(engine, ModelMaker) else TransformerMaker(engine)
