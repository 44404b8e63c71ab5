"""engine=megatron: the engine of Megatron-Core, and the GPTModel with our MoE layers that it trains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from ...kernels import ConfigError
from ...parallel.engines.megatron import MegatronCoreEngine
from ...parallel.engines.megatron.library import start
from ...parallel.layout import ResolvedLayout
from ...parallel.meshes import Meshes
from ...parallel.plan import ShardingPlan
from ...parallel.process import Process
from ..build import ModelPlan
from ..training.settings import TrainerSettings


class MegatronEngine(MegatronCoreEngine):
    """`MegatronCoreEngine` with a model: what the group `engine` of a config names.

    It is a `ModelMaker` (moe/training/makers.py), so the run asks it for the model instead of making our Transformer.
    """

    def check_model(self, model: ModelPlan, trainer: TrainerSettings, layout: ResolvedLayout) -> None:
        """Raises: ConfigError for what GPTModel, or Megatron without Transformer Engine, does not have."""
        if trainer.activation_offload:
            raise ConfigError(
                "trainer.activation_offload=true with engine=megatron, allowed: trainer.activation_offload=false, or "
                "engine=torch"
            )
        self._config(model, trainer, layout)

    def make_parts(
        self,
        model: ModelPlan,
        trainer: TrainerSettings,
        *,
        process: Process,
        meshes: Meshes,
        sequence_length: int = 0,
        seed: int = 0,
    ) -> tuple[Sequence[nn.Module], ShardingPlan]:
        """This rank's stages of the GPTModel, on its device and cut, with the initial values of our own model.

        Makes Megatron's process groups. Every rank must call it. Layers are split evenly, so `sequence_length` does not
        matter.
        """
        layout = meshes.layout
        start(process, layout, self.schedule.virtual)
        from .model import build_gpt_model
        from .stage import GPTStage

        config = self._config(model, trainer, layout)
        held = self.schedule.stages_of(meshes.coordinates.pp, layout.pp)
        last = self.schedule.stages(layout.pp) - 1
        parts = [
            GPTStage(
                build_gpt_model(
                    model,
                    config,
                    pre_process=stage == 0,
                    post_process=stage == last,
                    vp_stage=number if len(held) > 1 else None,
                    seed=seed,
                    context_attention=trainer.context_attention,
                )
            )
            for number, stage in enumerate(held)
        ]
        return parts, ShardingPlan()

    def _config(self, model: ModelPlan, trainer: TrainerSettings, layout: ResolvedLayout):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pages about Transformer Engine and Apex, which are not there
            from .config import transformer_config

            return transformer_config(
                model,
                layout=layout,
                precision=trainer.precision,
                checkpointing=trainer.activation_checkpointing,
                virtual_stages=self.schedule.virtual if layout.pp > 1 and self.schedule.virtual > 1 else None,
                deterministic_mode=trainer.deterministic,
            )
