"""What the training loop asks of an engine, whatever shards the model underneath."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """A model and its optimizer, spread over the ranks of a layout.

    One rule for scale: the caller's loss is already divided by what it counts over all ranks and micro-batches, and
    an engine only ever sums gradients. One optimizer step is

        for micro_batch in micro_batches:
            with engine.forward_context(last_micro_batch=...):
                loss = engine.model(...)
            engine.backward(loss)
        norm = engine.clip(1.0)
        engine.step()
        engine.zero_grad()

    Attributes:
        model: what to call; may be a wrapper that reduces gradients.
        module: the model itself, with its own attribute and parameter names.
        optimizer: over this rank's share of the parameters.
    """

    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer

    def forward_context(self, last_micro_batch: bool) -> AbstractContextManager[None]:
        """Around the forward pass of one micro-batch; gradients are complete after the backward of the last one."""
        ...

    def evaluation_context(self) -> AbstractContextManager[None]:
        """Around a forward pass without backward, in the precision of training."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this loss; after the last micro-batch, sum them over the ranks."""
        ...

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale all gradients down to a global norm of `max_norm` (None: leave them); () norm before, on all ranks."""
        ...

    def grad_norms_by_parameter(self) -> dict[str, float]:
        """Gradient norm of each whole parameter by name. Every rank must call it."""
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

    def load(self, path: Path) -> None:
        """Read model and optimizer from a checkpoint of any layout. Raises: CheckpointError, with nothing changed."""
        ...

    def load_weights(self, path: Path) -> None:
        """Read the model only, to learn on from it. Raises: CheckpointError, with nothing changed."""
        ...
