"""Load a trained model from a folder of any format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...kernels import CheckpointError
from ..data.tokenizer import Tokenizer
from ..interop.open import open_source
from ..models.transformer import Transformer


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, ready to generate text or to be evaluated.

    Attributes:
        model: in evaluation mode, float32, on the device asked for.
        tokenizer: the one that it was trained with.
        config: the groups that define it.
        step: optimizer steps that it was trained for.
        checkpoint: the folder that it came from.
    """

    model: Transformer
    tokenizer: Tokenizer
    config: Mapping[str, Any]
    step: int
    checkpoint: Path


def load_model(source: Path, device: torch.device | str = "cpu") -> LoadedModel:
    """Build the model of a folder and read its weights.

    Args:
        source: whatever `open_model` opens.

    Raises: what `open_model` raises; CheckpointError if there is no tokenizer, without which ids are no text.
    """
    stored = open_source(source, "source")
    if stored.tokenizer is None:
        raise CheckpointError(f"source={source} has no tokenizer, allowed: a folder with its tokenizer.json")
    return LoadedModel(stored.build(device), stored.tokenizer, stored.config, stored.step, stored.source)
