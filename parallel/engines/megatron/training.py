"""One optimizer step after the other on a model that `MegatronCoreEngine.prepare` has handed to Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...meshes import Meshes
from ..gradients import clip_copies, gather_norms
from ..whole_state import WithWholeState
from . import library
from .native import save_native
from .part import MegatronPart, as_module
from .state import MegatronState


class MegatronTraining(WithWholeState):
    """The `Engine` that `MegatronCoreEngine.prepare` returns; see `base.Engine` for what its methods promise.

    Scale. The parts' configuration says `calculate_per_token_loss`, with which Megatron's DDP sums gradients over data
    ranks, those of experts over the ranks with the same ones, and leaves it to finalize_model_grads to divide by a
    number of tokens. It gets none: the loss goes in multiplied by the caller's scale, and auxiliary losses put
    gradients of absolute size into the backward pass, so gradients are sums of what they should be. Norms and clipping
    are taken here, over the slices that the optimizers update, so that every element counts once in any layout:
    Megatron's own norm leaves out what tp ranks other than the first hold, unless it is marked.

    Args:
        parts: this rank's stages.
        chunks: the same in Megatron's DDP.
        optimizers: Megatron's, as `make_optimizers` chains them.
        native: write Megatron's distributed checkpoints too.
    """

    _state: MegatronState

    def __init__(
        self,
        parts: Sequence[MegatronPart],
        chunks: Sequence[Any],
        optimizers: Any,
        *,
        meshes: Meshes,
        device: torch.device,
        native: bool = False,
    ) -> None:
        self.parts: list[nn.Module] = [as_module(part) for part in parts]
        self.optimizer = optimizers
        self.meshes = meshes
        self._megatron_parts = list(parts)
        self._chunks = list(chunks)
        self._device = device
        self._native = native
        self._state = MegatronState(parts, optimizers, meshes, device)
        self._are_ready = False  # the slices of gradients, for norms and the update
        self._tell_schedules()

    def _tell_schedules(self) -> None:
        """Megatron's schedules ask the model's configuration how gradients are reduced."""
        config = self._chunks[0].config
        assert config.calculate_per_token_loss  # or gradients would be means
        config.finalize_model_grads_func = _finalize
        if self._chunks[0].ddp_config.overlap_grad_reduce:
            without = [chunk.no_sync for chunk in self._chunks]
            config.no_sync_func = without if len(without) > 1 else without[0]

    def run(self, micro_batches: Sequence[Mapping[str, Any]], scale: float) -> Tensor:
        if self.meshes.layout.tp > 1:
            library.seed_generators()
        losses = self._pass(micro_batches, scale, forward_only=False)
        self._are_ready = False
        return self._share(losses)

    def evaluate(self, micro_batch: Mapping[str, Any]) -> Tensor:
        # The interleaved schedule takes no fewer micro-batches than there are ranks.
        count = self.meshes.layout.pp if len(self._chunks) > 1 else 1
        with torch.no_grad():
            return self._share(self._pass([micro_batch] * count, 1.0, forward_only=True)[:1])

    def _pass(self, micro_batches: Sequence[Mapping[str, Any]], scale: float, forward_only: bool) -> list[Tensor]:
        """Micro-batches through Megatron's schedule; their scaled losses on the last stage, nothing elsewhere."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        shapes = {tuple(micro_batch["tokens"].shape) for micro_batch in micro_batches}
        if len(shapes) != 1:
            raise ValueError(f"the micro-batches of a step have shapes {sorted(shapes)}, Megatron needs one shape")
        ((rows, length),) = shapes
        for part in self._megatron_parts:
            part.begin_step(micro_batches)
        return get_forward_backward_func()(
            forward_step_func=partial(_forward, scale),
            data_iterator=[iter(micro_batches) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def _share(self, losses: Sequence[Tensor]) -> Tensor:
        """All tp ranks have the same loss."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for loss in losses:
            total += loss.detach()
        return total / self.meshes.layout.tp

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As promised, but copies: one parameter of Megatron's may hold several of ours."""
        for part in self._megatron_parts:
            for name, own in part.local_parts(lambda parameter: parameter).items():
                yield name, nn.Parameter(own.values, requires_grad=False)

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> Tensor:
        return clip_copies(self._gradients(), max_norm, self._device)

    def _gradients(self) -> dict[int, list[Tensor]]:
        """The gradients that this rank's optimizers use, by on how many ranks the same elements are."""
        self._make_ready()
        found: dict[int, list[Tensor]] = {}
        for parameter, own in self._state.slices.items():
            gradient = own.main.grad
            assert gradient is not None
            found.setdefault(self._state.copies[parameter], []).append(gradient)
        return found

    def _make_ready(self) -> None:
        if not self._are_ready:
            self.optimizer.prepare_grads()
            self._are_ready = True

    def grad_norms_by_parameter(self) -> dict[str, float]:
        layout = self.meshes.layout
        own: list[dict[str, float]] = []
        learn = self._state.trained
        for part in self._megatron_parts:
            found = {
                name: held for name, held in part.local_parts(self._state.gradients(part)).items() if name in learn
            }
            squares = torch.zeros(len(found), dtype=torch.float64)
            for row, held in enumerate(found.values()):
                copies = layout.stage
                for cut in held.cuts:
                    copies //= cut.group.size()
                squares[row] = torch.linalg.vector_norm(held.values, dtype=torch.float64).square().cpu() / copies
            if self.meshes.stage_group is not None:
                squares = squares.to(self._device)
                dist.all_reduce(squares, group=self.meshes.stage_group)
            own.append(dict(zip(found, squares.sqrt().tolist())))
        return gather_norms(own, self.meshes)

    def step(self) -> None:
        self._make_ready()
        self.optimizer.step_with_ready_grads()

    def zero_grad(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad(set_to_none=True)
        self._are_ready = False

    def save_beside(self, checkpoints: Path, step: int) -> None:
        """Megatron's goes to the folder `megatron` beside ours, and is kept as long as ours of that step."""
        if self._native:
            save_native(self._megatron_parts, self.optimizer, checkpoints, step)

    def reset_parameters(self, seed: int) -> None:
        """Initial values again, also where parameters are rounded."""
        self._state.reset_parameters(seed)


def _forward(scale: float, batches: Iterator[Mapping[str, Any]], chunk: Any) -> tuple[Tensor, Any]:
    """A forward step as Megatron's schedules want it: the output, and what makes the loss of the last stage's."""
    output = chunk(**next(batches))

    def loss_of(summed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = summed * scale
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach()

    return output, loss_of


def _finalize(chunks: Sequence[Any], num_tokens: Tensor | None = None, **others: Any) -> None:
    """Megatron's sums of gradients over all groups, without its division by a number of tokens."""
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(chunks, None, **others)  # type: ignore[arg-type]
