"""A GPTModel of Megatron-Core with the shape, and with the MoE layers, that a config of ours describes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ...kernels import ConfigError
from ..build import ModelPlan
from ..context import StepContext
from .config import model_arguments, transformer_config
from .groups import layout_of
from .layer import MegatronMoELayer
from .parts import Visible
from .spec import decoder_block_spec, stage_layers

__all__ = ["ScatterfoldGPT", "build_gpt_model", "transformer_config"]


class ScatterfoldGPT(GPTModel):
    """GPTModel that knows which model of ours it is (one pipeline stage of); `build_gpt_model` makes it.

    Attributes:
        plan: the whole model.
        layers: numbers, counting from 0 in the whole model, of the layers that are here.
        context_attention: how queries reach the keys of other cp ranks: gather or ring (CUDA, bf16).
    """

    def __init__(
        self, plan: ModelPlan, config: TransformerConfig, *, context_attention: str = "gather", **stage: Any
    ) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        vp_stage = stage.get("vp_stage")
        spec = decoder_block_spec(plan, config, groups, vp_stage)
        arguments: dict[str, Any] = {**model_arguments(plan.config), **stage, "pg_collection": groups}
        with _told_less():
            super().__init__(config, spec, **arguments)  # type: ignore[arg-type]
        self.plan = plan
        self.layers = tuple(stage_layers(config, vp_stage))
        self.context_attention = context_attention

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """GPTModel's forward pass, causal within documents.

        Args:
            input_ids: (B, S / CP) int64, a part as `parallel.context.zigzag.own_part` cuts it; every stage gets it.
            position_ids: not looked at: rotary positions count along the row.
            labels: (B, S / CP) int64, what each position should predict.
            cu_seqlens: (n + 1,) int32 on the CPU, document boundaries over the B * S tokens of whole sequences, each
                row start among them; None for one document a row.

        Returns: cross-entropy (B, S / CP) float32 of each token, anything finite where a label is negative; without
            labels logits (B, S / CP, V / TP); of a stage but the last hidden (S / (CP * TP), B, D).
        """
        visible = Visible.of(self.plan.config, input_ids, cu_seqlens, self.pg_collection, self.context_attention)
        inputs: tuple[Any, ...] = (input_ids, position_ids, attention_mask, decoder_input, labels)
        return super().forward(*inputs, packed_seq_params=visible, **others)

    def moe_layers(self) -> list[tuple[int, MegatronMoELayer]]:
        """The MoE layers of this stage with their numbers in the whole model; each has `.router`."""
        pairs = zip(self.layers, self.decoder.layers)
        return [(number, layer.mlp) for number, layer in pairs if isinstance(layer.mlp, MegatronMoELayer)]

    def begin_step(self, context: StepContext) -> None:
        """Tell the MoE layers what all micro-batches of an optimizer step have in common, until the next call.

        `global_tokens` (None: auxiliary losses are scaled as Megatron's schedules ask, by MoEAuxLossAutoScaler) and
        `statistics` are read; the rest follows from the shapes. To be called before the schedule, not per micro-batch:
        recomputation in the backward pass reads it too.
        """
        for _, layer in self.moe_layers():
            layer.context = context


def build_gpt_model(
    plan: ModelPlan,
    config: TransformerConfig,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    seed: int = 0,
    context_attention: str = "gather",
) -> ScatterfoldGPT:
    """One pipeline stage, on this rank's device, with the very initial values that our own model has for this seed.

    Needs `parallel_state.initialize_model_parallel`, and on CUDA `torch.cuda.set_device`.

    Args:
        config: what `transformer_config` made; its sizes must be those of parallel_state.
        pre_process, post_process: whether the embedding is here, and the final norm with the head.
        vp_stage: which stage of this pipeline rank, in the interleaved schedule.
        seed: as of `Transformer`.
        context_attention: as at `ScatterfoldGPT`.

    Raises: ConfigError if Megatron's groups are not those of the config, or a parameter is frozen in part.
    """
    from .weights import freeze, reset_parameters

    _check_groups(config)
    tracker = get_cuda_rng_tracker()
    if torch.cuda.is_available() and tracker is not None and not tracker.is_initialized():
        model_parallel_cuda_manual_seed(seed)  # what the embedding forks under sequence parallelism
    stage = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
    model = ScatterfoldGPT(plan, config, context_attention=context_attention, **stage)
    reset_parameters(model, seed)
    freeze(model, plan.config.frozen)
    return model


@contextlib.contextmanager
def _told_less() -> Iterator[None]:
    """Without a warning for each layer that its MLP is none of Megatron's."""
    logger = logging.getLogger("megatron.core.transformer.transformer_layer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_groups(config: TransformerConfig) -> None:
    found = layout_of(ProcessGroupCollection.use_mpu_process_groups())
    for name, wanted in {
        "tp": config.tensor_model_parallel_size,
        "cp": config.context_parallel_size,
        "pp": config.pipeline_model_parallel_size,
        "ep": config.expert_model_parallel_size,
        "etp": config.expert_tensor_parallel_size,
    }.items():
        if getattr(found, name) != wanted:
            raise ConfigError(
                f"Megatron's groups have {name}={getattr(found, name)}, allowed: layout.{name}={wanted} of the config"
            )
