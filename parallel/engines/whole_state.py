"""Checkpoints of engines that keep their state in their own way, and put whole tensors of ours together from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..checkpoint.distributed import open_checkpoint
from ..checkpoint.lazy import LazyTensor
from ..checkpoint.read import check_sums, check_whole
from ..checkpoint.state import MODEL, OPTIMIZER
from ..process import place, together

Stored = Mapping[str, LazyTensor]


class WholeState(Protocol):
    """What turns an engine's state into tensors under our names, and back. Every rank must call each method."""

    def collect(self) -> dict[str, Tensor]:
        """As `Engine.state_dict` promises."""
        ...

    def check(self, model: Stored, remembered: Stored, source: Path) -> None:
        """Raises: CheckpointError, on every rank, if these are not the tensors of this model and optimizer."""
        ...

    def fill_model(self, tensors: Stored, source: Path) -> None: ...

    def fill_optimizer(self, tensors: Stored, source: Path) -> None: ...

    def forget_optimizer(self) -> None: ...


class WithWholeState:
    """The methods of an `Engine` that read and write checkpoints, through its `_state`."""

    _state: WholeState

    def state_dict(self) -> dict[str, Tensor]:
        return self._state.collect()

    def load(self, path: Path) -> None:
        path = Path(path)
        together(lambda: check_sums(path, check_whole(path)["files"], *place()))
        model, remembered = (
            together(lambda kind=kind: open_checkpoint(path, kind, checked=False)) for kind in (MODEL, OPTIMIZER)
        )
        self._state.check(model, remembered, path)
        self._state.fill_model(model, path)
        if remembered:
            self._state.fill_optimizer(remembered, path)
        else:  # written before the first step
            self._state.forget_optimizer()

    def load_weights(self, tensors: Stored, source: Path) -> None:
        self._state.fill_model(tensors, source)

    def load_optimizer(self, tensors: Stored, source: Path) -> None:
        self._state.fill_optimizer(tensors, source)
