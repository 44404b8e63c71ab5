"""A model that lies in a folder, in any format, before any of its tensors is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...kernels import CheckpointError
from ...parallel.checkpoint import model_state
from ...parallel.checkpoint.lazy import LazyTensor
from ...parallel.checkpoint.state import MODEL
from ..build import ModelPlan
from ..data.tokenizer import Tokenizer
from ..models.transformer import Transformer

GROUPS = ("model", "router", "experts", "dispatcher")


@dataclass(frozen=True)
class StoredModel:
    """What every format opens as and every format is written from.

    Attributes:
        source: the folder; errors name it.
        format: checkpoint, scatterfold, huggingface or megatron.
        config: the groups `model` (with a vocabulary size), `router`, `experts` and `dispatcher` of a run's config.
        tensors: parameters and persistent buffers under Scatterfold's own names and in its shapes.
        tokenizer: None if the folder has none that can be read.
        step: optimizer steps that it was trained for; 0 if nobody says.
        optimizer: its optimizer's state as `<parameter>.<what>`, where the format keeps one.
        carried: files that go along unread when it is written for Hugging Face: generation_config.json, the
            tokenizer's files, by name.
        origin: the config.json it came with, of whose fields that say nothing about the computation it keeps (the ids
            of special tokens).
    """

    source: Path
    format: str
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    tokenizer: Tokenizer | None = None
    step: int = 0
    optimizer: Mapping[str, LazyTensor] = field(default_factory=dict)
    carried: Mapping[str, Path] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def plan(self) -> ModelPlan:
        """How to build the module."""
        return ModelPlan.from_config(self.config)

    def checked(self) -> StoredModel:
        """The same, after checking that it holds exactly the tensors that its config asks for.

        Raises: CheckpointError that names the first tensor that is missing, unknown or of a wrong shape.
        """
        check_tensors(self)
        return self

    def with_model(self, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> StoredModel:
        """Another model made of this one, of the same step, tokenizer and files; the optimizer's state is left out."""
        return replace(self, config=config, tensors=tensors, optimizer={})

    def parameters(self) -> frozenset[str]:
        """Names of the tensors that are trained; the others are buffers."""
        with torch.device("meta"):
            return frozenset(name for name, _ in self.plan().make_model().named_parameters())

    def build(self, device: torch.device | str = "cpu") -> Transformer:
        """The module with its values, on this process alone, in float32 and in evaluation mode."""
        plan = self.checked().plan()
        with torch.device("meta"):
            model = plan.make_model()
        model.to_empty(device=device)
        model.reset_parameters(0)  # also fills what no format holds
        with torch.no_grad():
            for name, tensor in model_state(model).items():
                tensor.copy_(self.tensors[name.removeprefix(MODEL)].read())
        return model.eval()


def wanted_shapes(plan: ModelPlan) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of a model, which is not built for it."""
    with torch.device("meta"):
        return {name.removeprefix(MODEL): tensor.shape for name, tensor in model_state(plan.make_model()).items()}


def check_tensors(stored: StoredModel) -> None:
    """Raises: CheckpointError if the tensors of a stored model are not those of its config."""
    wanted = wanted_shapes(stored.plan())
    for name, shape in wanted.items():
        held = stored.tensors.get(name)
        if held is None:
            raise CheckpointError(f"{stored.source} lacks {name}, allowed: a folder with all tensors of its model")
        if held.shape != shape:
            raise CheckpointError(
                f"{stored.source}: {name} is {tuple(held.shape)}, but its config makes it {tuple(shape)}"
            )
    unknown = [name for name in stored.tensors if name not in wanted]
    if unknown:
        raise CheckpointError(
            f"{stored.source} holds {unknown[0]}, which its model does not have ({len(unknown)} in all)"
        )
