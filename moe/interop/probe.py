"""Run a stored model one layer at a time: a model of any size needs the memory of its largest layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import ConfigError
from ...parallel.checkpoint import model_state
from ...parallel.checkpoint.state import MODEL
from ..build import ModelPlan
from ..models.transformer import Transformer
from .stored import StoredModel

Watch = Callable[[Transformer], AbstractContextManager[None]]


def layers_of(stored: StoredModel, device: torch.device | str = "cpu") -> Iterator[Transformer]:
    """Parts of one layer each, in their order, with their values, in float32 and in evaluation mode.

    The first also embeds, the last also predicts. A part is built when it is asked for; let go of it before the next.
    """
    plan, tensors = stored.checked().plan(), dict(stored.tensors)
    if plan.config.tie_embeddings:  # a part cannot tie what another part holds
        plan = replace(plan, config=replace(plan.config, tie_embeddings=False))
        tensors["head.weight"] = tensors["embedding.weight"]
    for layer in range(plan.config.layers):
        yield _part(plan, layer, tensors, device)


def _part(plan: ModelPlan, layer: int, tensors: Mapping[str, Any], device: torch.device | str) -> Transformer:
    with torch.device("meta"):
        part = plan.make_model(layers=[layer])
    part.to_empty(device=device)
    for module in part.modules():  # what no format holds, such as rotary frequencies
        if (reset := getattr(module, "reset_buffers", None)) is not None:
            reset()
    with torch.no_grad():
        for name, tensor in model_state(part).items():
            tensor.copy_(tensors[name.removeprefix(MODEL)].read())
    return part.eval()


@torch.no_grad()
def run_layers(
    stored: StoredModel,
    batches: Sequence[Mapping[str, Any]],
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
) -> list[Tensor]:
    """What the model returns for each batch: logits, or the summed loss where it has labels.

    Args:
        batches: arguments of the model's forward pass, on the device; all their hidden states are kept.
        watch: a context around the passes of each part, to look into it.

    Returns: on the device, one a batch: (B, S, V), or ().
    Raises: CheckpointError if the tensors are not those of the model or cannot be read.
    """
    hidden: list[Tensor | None] = [None] * len(batches)
    for part in layers_of(stored, device):
        with nullcontext() if watch is None else watch(part):
            for number, batch in enumerate(batches):
                hidden[number] = part(**batch, received=hidden[number])
        del part
    return [out for out in hidden if out is not None]


def largest_difference(a: StoredModel, b: StoredModel, tokens: Tensor, device: torch.device | str = "cpu") -> float:
    """The largest absolute difference of the logits of two models, in float32.

    Args:
        tokens: (B, S) int64, such as `probe_tokens` draws.

    Raises: ConfigError if their vocabularies differ; CheckpointError if one cannot be read.
    """
    if a.plan().config.vocab_size != b.plan().config.vocab_size:
        raise ConfigError(
            f"model.vocab_size={b.plan().config.vocab_size} differs from {a.plan().config.vocab_size} of {a.source}, "
            "allowed: the same"
        )
    batch = {"tokens": tokens.to(device)}
    (one,), (other,) = (run_layers(stored, [batch], device) for stored in (a, b))
    return float((one - other).abs().max())


def probe_tokens(stored: StoredModel, rows: int = 2, length: int = 64, seed: int = 0) -> Tensor:
    """Random token ids (rows, length), no longer than the model's longest sequence."""
    config = stored.plan().config
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (rows, min(length, config.max_positions)), generator=generator)
