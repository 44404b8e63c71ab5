"""One optimizer step after the other on a model that `TorchEngine.prepare` has spread over the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.fill import fill
from ..checkpoint.lazy import LazyTensor
from ..checkpoint.read import check_fits, check_whole, load, read_shapes
from ..checkpoint.state import (
    MODEL,
    OPTIMIZER,
    create_optimizer_state,
    model_state,
    optimizer_state,
    restore_numbers,
)
from ..meshes import Meshes
from ..process import together
from .gradients import GradientSums, clip_gradients, gradient_norms


class Runner(Protocol):
    """How micro-batches pass through the parts of a model: one after the other, or as a pipeline."""

    def run(self, micro_batches: Sequence[Mapping[str, Any]], scale: float) -> Tensor: ...

    def evaluate(self, micro_batch: Mapping[str, Any]) -> Tensor: ...


class TorchTraining:
    """The `Engine` that `TorchEngine.prepare` returns; see `base.Engine` for what its methods promise."""

    def __init__(
        self,
        parts: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        *,
        runner: Runner,
        meshes: Meshes,
        device: torch.device,
        sums: GradientSums,
    ) -> None:
        self.parts = list(parts)
        self.optimizer = optimizer
        self.meshes = meshes
        self._runner = runner
        self._device = device
        self._sum_gradients = sums
        self._shards = [child for part in parts for child in part.modules() if isinstance(child, FSDPModule)]

    def run(self, micro_batches: Sequence[Mapping[str, Any]], scale: float) -> Tensor:
        loss = self._runner.run(micro_batches, scale)
        self._sum_gradients()
        return self._share(loss)

    def evaluate(self, micro_batch: Mapping[str, Any]) -> Tensor:
        with torch.no_grad():
            return self._share(self._runner.evaluate(micro_batch))

    def _share(self, loss: Tensor) -> Tensor:
        """All tp ranks have the same loss, that of the tokens of their cp rank."""
        return loss.detach().double() / self.meshes.layout.tp

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part in self.parts:
            yield from part.named_parameters()

    def clip(self, max_norm: float | None) -> Tensor:
        return clip_gradients((p for _, p in self.named_parameters()), max_norm, self.meshes, self._device)

    def grad_norms_by_parameter(self) -> dict[str, float]:
        return gradient_norms(self.parts, self.meshes, self._device)

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        self._reshard()
        return {**model_state(*self.parts), **optimizer_state(self.optimizer, *self.parts)}

    def save_beside(self, checkpoints: Path, step: int) -> None:
        """Nothing: our checkpoints are torch's."""

    def load(self, path: Path) -> None:
        self._reshard()
        own = model_state(*self.parts)
        elsewhere = self.meshes.names_elsewhere(own)

        def look() -> bool:
            check_whole(path)
            check_fits(path, own, elsewhere)
            return any(name.startswith(OPTIMIZER) for name in read_shapes(path))

        if not together(look):  # written before the first step, so there is nothing to remember
            self.optimizer.state.clear()
            return load(path, own, elsewhere=elsewhere)
        with self._optimizer_state() as remembered:
            state = {**own, **remembered}
            load(path, state, elsewhere=self.meshes.names_elsewhere(state))
        restore_numbers(self.optimizer, state, *self.parts)

    def load_weights(self, tensors: Mapping[str, LazyTensor], source: Path) -> None:
        self._reshard()
        own = {name.removeprefix(MODEL): tensor for name, tensor in model_state(*self.parts).items()}
        fill(own, tensors, source, self.meshes.names_elsewhere(own))

    def load_optimizer(self, tensors: Mapping[str, LazyTensor], source: Path) -> None:
        self._reshard()
        with self._optimizer_state() as state:
            own = {name.removeprefix(OPTIMIZER): tensor for name, tensor in state.items()}
            fill(own, tensors, source, self.meshes.names_elsewhere(own))
        restore_numbers(self.optimizer, state, *self.parts)

    @contextlib.contextmanager
    def _optimizer_state(self) -> Iterator[dict[str, Tensor]]:
        """What the optimizer remembers, to be read in place; what was made for it is given up if that fails."""
        created = not self.optimizer.state
        if created:
            create_optimizer_state(self.optimizer)
        try:
            yield optimizer_state(self.optimizer, *self.parts)
        except Exception:
            if created:
                self.optimizer.state.clear()
            raise

    def _reshard(self) -> None:
        """Free parameters that a forward pass left gathered, so that names lead to shards."""
        for module in self._shards:
            module.reshard()


class Sequential:
    """Micro-batches one after the other through a model that is whole in its depth.

    Args:
        model: what to call; may be a wrapper that reduces gradients.
        part: the model itself.
        autocast: compute in bfloat16 where torch.autocast does.
        reduce_always: let FSDP reduce gradients after each micro-batch.
    """

    def __init__(
        self, model: nn.Module, part: nn.Module, *, device: torch.device, autocast: bool, reduce_always: bool
    ) -> None:
        self._model = model
        self._part = part
        self._device = device
        self._autocast = autocast
        self._reduce_always = reduce_always

    def run(self, micro_batches: Sequence[Mapping[str, Any]], scale: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            with self._synchronising(is_last=number == len(micro_batches)):
                with autocasting(self._autocast, self._device):
                    loss = self._model(**micro_batch) * scale
                loss.backward()
            total += loss.detach()
        return total

    def evaluate(self, micro_batch: Mapping[str, Any]) -> Tensor:
        with autocasting(self._autocast, self._device):
            return self._model(**micro_batch)

    @contextlib.contextmanager
    def _synchronising(self, is_last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are summed over ranks with those of the last."""
        with contextlib.ExitStack() as stack:
            if isinstance(self._part, FSDPModule):
                self._part.set_requires_gradient_sync(is_last or self._reduce_always)
                self._part.set_requires_all_reduce(is_last)
                self._part.set_is_last_backward(is_last)
            elif isinstance(self._model, DistributedDataParallel) and not is_last:
                stack.enter_context(self._model.no_sync())
            yield


def autocasting(enabled: bool, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """torch.autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()  # type: ignore[return-value]
