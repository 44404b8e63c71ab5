"""What a run will be: its configuration, checked and turned into objects, before any process or file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels import ConfigError
from ...parallel.communication.settings import CommunicationSettings
from ...parallel.engines import Job
from ...parallel.layout import Layout, ResolvedLayout
from ..build import ModelPlan
from ..components import build, check
from ..data import DataSettings, open_tokenizer
from ..data.batches import Share
from ..layout_checks import check_layout, check_ring
from .makers import maker_of
from .optimizers import AdamW
from .schedules import Schedule
from .settings import LoggerSettings, TrainerSettings


@dataclass(frozen=True)
class RunPlan:
    """A configuration, checked and turned into objects that take no memory and need no other process."""

    config: dict[str, Any]
    seed: int
    trainer: TrainerSettings
    logger: LoggerSettings
    data: DataSettings
    model: ModelPlan
    optimizer: AdamW
    schedule: Schedule
    engine: Any
    layout: Layout
    communication: CommunicationSettings

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RunPlan:
        """Raises: ConfigError or DataError that names the field, its value and what is allowed."""
        config = dict(config)
        seed = config.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ConfigError(f"seed={seed!r} is no whole number, allowed: 0, 1, 2, …")
        data = check(DataSettings, config.get("data") or {}, "data")
        model = ModelPlan.from_config(config, open_tokenizer(data.tokenizer, data.eod).vocab_size)
        if data.sequence_length > model.config.max_positions:
            raise ConfigError(
                f"data.sequence_length={data.sequence_length} is longer than model.max_positions="
                f"{model.config.max_positions}, allowed: up to that"
            )
        return cls(
            config=config,
            seed=seed,
            trainer=check(TrainerSettings, config["trainer"], "trainer"),
            logger=check(LoggerSettings, config.get("logger") or {}, "logger"),
            data=data,
            model=model,
            optimizer=build(config["optimizer"], "optimizer"),
            schedule=build(config["schedule"], "schedule"),
            engine=build(config["engine"], "engine"),
            layout=check(Layout, config.get("layout") or {}, "layout"),
            communication=check(CommunicationSettings, config.get("communication") or {}, "communication"),
        )

    def resolve_layout(self, world: int) -> ResolvedLayout:
        """The layout over so many ranks. Raises: ConfigError if ranks, model or data cannot be cut that way."""
        layout = self.layout.resolve(world)
        check_layout(layout, self.model, self.data.sequence_length)
        if layout.cp > 1 and self.trainer.context_attention == "ring":
            check_ring(
                self.model,
                self.data.sequence_length,
                device=self.trainer.device,
                precision=self.trainer.precision,
                pack_documents=self.data.pack_documents,
            )
        share = Share.of(self.data.global_batch_size, self.data.micro_batch_size, 0, layout.data)
        self.engine.check(layout, self.job(share))
        maker_of(self.engine).check_model(self.model, self.trainer, layout)
        stages = self.engine.schedule.stages(layout.pp)
        self.model.split(stages, self.data.sequence_length)
        return layout

    def job(self, share: Share) -> Job:
        """What the engine is asked for, besides the layout, where each rank has such a share of a batch."""
        trainer = self.trainer
        return Job(
            micro_batches=share.micro_batches,
            micro_batch_size=share.micro_batch_size,
            precision=trainer.precision,
            gradient_clip=trainer.gradient_clip,
            checkpointing=trainer.activation_checkpointing,
            compile=trainer.compile,
            on_gpu=trainer.device == "cuda" or (trainer.device == "auto" and torch.cuda.is_available()),
            optimizer=self.optimizer,
        )
