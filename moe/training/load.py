"""Load a trained model from a run folder, one of its checkpoints, or an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...parallel.checkpoint import load_weights
from ..build import ModelPlan
from ..data.tokenizer import Tokenizer, tokenizer_from
from ..interop.safetensors import is_export
from ..models.transformer import Transformer
from .resume import weights_of


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, ready to generate text or to be evaluated.

    Attributes:
        model: in evaluation mode, float32, on the device asked for.
        tokenizer: the one that it was trained with.
        config: of its run, resolved.
        step: optimizer steps that it was trained for.
        checkpoint: the folder that it came from.
    """

    model: Transformer
    tokenizer: Tokenizer
    config: dict[str, Any]
    step: int
    checkpoint: Path


def load_model(source: Path, device: torch.device | str = "cpu") -> LoadedModel:
    """Build the model of a checkpoint and read its weights.

    Args:
        source: a run folder (its newest whole checkpoint is taken), one of its checkpoints, or a folder that
            `scatterfold convert to=safetensors` wrote.

    Raises: CheckpointError if there is no whole checkpoint; DataError if its tokenizer's file is gone or has changed.
    """
    checkpoint, meta = weights_of(source, "source")
    tokenizer = tokenizer_from(meta["tokenizer"], checkpoint if is_export(checkpoint) else checkpoint.parent.parent)
    plan = ModelPlan.from_config(meta["config"], tokenizer.vocab_size)
    with torch.device("meta"):
        model = plan.make_model()
    model.to_empty(device=device)
    model.reset_parameters(0)  # also fills what a checkpoint does not hold, such as rotary frequencies
    load_weights(checkpoint, model)
    return LoadedModel(model.eval(), tokenizer, meta["config"], meta["step"], checkpoint)
