"""What the training loop asks of an engine, whatever spreads the model underneath."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...kernels.errors import ConfigError
from ..checkpoint.lazy import LazyTensor
from ..layout import ResolvedLayout
from ..pipeline.stages import PipelineSchedule

PRECISIONS = ("fp32", "bf16")


def check_precision(precision: str) -> None:
    """Raises: ConfigError for one that is not of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={precision!r} is unknown, allowed: {', '.join(PRECISIONS)}")


def check_not_compiled(compile: bool, engine: str) -> None:
    """Raises: ConfigError if blocks are to be compiled, for an engine that cannot."""
    if compile:
        raise ConfigError(f"trainer.compile=true with engine={engine}, allowed: trainer.compile=false, or engine=torch")


@dataclass(frozen=True)
class Job:
    """What a run asks of its engine besides the layout, known before any process starts.

    Attributes:
        micro_batches: of one optimizer step on one rank.
        micro_batch_size: sequences in each.
        precision: one of `PRECISIONS`.
        gradient_clip: largest global gradient norm; None to clip nothing.
        checkpointing: which activations are recomputed: none, full or selective.
        compile: whether blocks are compiled.
        on_gpu: whether ranks compute on CUDA devices.
        optimizer: what will make the optimizer, with its settings as attributes.
    """

    micro_batches: int = 1
    micro_batch_size: int = 1
    precision: str = "fp32"
    gradient_clip: float | None = None
    checkpointing: str = "none"
    compile: bool = False
    on_gpu: bool = False
    optimizer: Any = None


class EngineChoice(Protocol):
    """What a config chooses with `engine=…`; besides, `prepare` spreads a model (see `TorchEngine.prepare`).

    An engine that trains another class of model than ours is a class of the floor above, which makes it
    (`moe.training.makers.ModelMaker`): this floor knows no model.

    Attributes:
        schedule: which parts of the model are whose in a pipeline.
    """

    schedule: PipelineSchedule

    def check(self, layout: ResolvedLayout, job: Job) -> None:
        """Say before the start what cannot run. Raises: ConfigError that names the field, and the engine that can."""
        ...


class Engine(Protocol):
    """A model and its optimizer, spread over the ranks of a layout.

    One rule for scale: the caller's `scale` is one over what the loss counts over all ranks and micro-batches, and an
    engine only ever sums gradients. One optimizer step is

        loss = engine.run(micro_batches, scale=1 / global_targets)     # this rank's share
        norm = engine.clip(1.0)
        engine.step()
        engine.zero_grad()

    Attributes:
        parts: this rank's parts of the model: one, or several stages of a pipeline, in the order of the forward pass.
            Parameters and modules have the names that they have in the whole model.
        optimizer: over this rank's parts of the parameters.
    """

    parts: list[nn.Module]
    optimizer: torch.optim.Optimizer

    def run(self, micro_batches: Sequence[Mapping[str, Any]], scale: float) -> Tensor:
        """Forward and backward pass of all micro-batches of a step; then gradients are whole.

        Args:
            micro_batches: arguments of the model's forward pass, the same number on every rank.
            scale: by which each summed loss is multiplied.

        Returns: () float64, this rank's share of the scaled loss: the sum over all ranks is the loss of the step.
        """
        ...

    def evaluate(self, micro_batch: Mapping[str, Any]) -> Tensor:
        """A forward pass in the precision of training: () float64, this rank's share of the summed loss, unscaled."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parts of the parameters by their names in the whole model."""
        ...

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale all gradients down to a global norm of `max_norm` (None: leave them); () norm before, on all ranks."""
        ...

    def grad_norms_by_parameter(self) -> dict[str, float]:
        """Gradient norm of each parameter of the whole model by name. Every rank must call it."""
        ...

    def step(self) -> None:
        """Update the parameters."""
        ...

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Model and optimizer as one flat mapping of live tensors, by names that do not depend on the layout."""
        ...

    def save_beside(self, checkpoints: Path, step: int) -> None:
        """Write what other tools of this engine read, beside the folder of checkpoints that has one of this step now.

        Every rank must call it. Most engines have nothing to write.
        """
        ...

    def load(self, path: Path) -> None:
        """Read model and optimizer from a checkpoint of any layout. Raises: CheckpointError, with nothing changed."""
        ...

    def load_weights(self, tensors: Mapping[str, LazyTensor], source: Path) -> None:
        """Read the model from tensors of any format, to learn on from it.

        Args:
            tensors: by the names of parameters and buffers in the whole model.
            source: where they lie, for messages.

        Raises: CheckpointError if they are not those of the model, with nothing changed.
        """
        ...

    def load_optimizer(self, tensors: Mapping[str, LazyTensor], source: Path) -> None:
        """Read what the optimizer remembers, as `<parameter>.<what>`, step counts included.

        Raises: CheckpointError if it is not what this optimizer remembers of this model, with nothing changed.
        """
        ...
