"""One optimizer step after the other on a model that `DeepSpeedEngine.prepare` has handed to DeepSpeed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...meshes import Meshes
from ..gradients import clip_factor
from ..whole_state import WithWholeState
from .experts import Cut, is_expert
from .state import make_state


class DeepSpeedTraining(WithWholeState):
    """The `Engine` that `DeepSpeedEngine.prepare` returns; see `base.Engine` for what its methods promise.

    Scale. DeepSpeed averages gradients over all data ranks, those of experts too, over however few ranks it sums them
    (its engine.py, `_reduce_expert_gradients`); an `Engine` sums. The loss alone cannot make up for it: auxiliary
    losses put gradients of absolute size into the backward pass. So the loss goes in as it is, and the average is
    undone where ZeRO divides by its loss scale, with the clipping: a loss scale of 1 / ranks makes sums of averages,
    and costs no pass over the gradients. ZeRO multiplies the loss by its scale, so it gets `loss * ranks`, which for
    ranks that are a power of two gives back the loss to the bit.

    Args:
        engine: DeepSpeed's.
        part: the model.
        optimizer: the one that the run made; with ZeRO its groups hold flat slices of float32 parameters.
        stage: of ZeRO.
        cuts: by name, parameters that are parts of others: experts under ep.
        native: write DeepSpeed's own checkpoints too.
        around_forward: what forward passes that learn run in.
    """

    def __init__(
        self,
        engine: Any,
        part: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        stage: int,
        meshes: Meshes,
        device: torch.device,
        cuts: Mapping[str, Cut],
        native: bool = False,
        around_forward: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.parts = [part]
        self.optimizer = optimizer
        self.meshes = meshes
        self._engine = engine
        self._stage = stage
        self._device = device
        self._native = native
        self._around_forward = around_forward
        self._ranks = meshes.layout.world
        self._zero: Any = engine.optimizer if stage > 0 else None
        self._state = make_state(engine, part, optimizer, stage, cuts, meshes)
        self._has_gradients = False
        self._clipped_by = torch.ones((), device=device)
        if self._zero is not None:
            self._zero.override_loss_scale(1.0 / self._ranks)

    def run(self, micro_batches: Sequence[Mapping[str, Any]], scale: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        self._has_gradients = True
        for number, micro_batch in enumerate(micro_batches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            with self._around_forward():
                loss = self._engine(**micro_batch) * scale
            self._engine.backward(loss if self._zero is None else loss * self._ranks, scale_wrt_gas=False)
            total += loss.detach()
        if self._zero is None:
            torch._foreach_mul_([p.grad for p in self._trained()], float(self._ranks))  # type: ignore[reportPrivateImportUsage]
        return total

    def evaluate(self, micro_batch: Mapping[str, Any]) -> Tensor:
        with torch.no_grad():
            return self._engine(**micro_batch).detach().double()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.parts[0].named_parameters()

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parts[0].parameters() if parameter.requires_grad]

    def clip(self, max_norm: float | None) -> Tensor:
        """As promised; with ZeRO, gradients are scaled in `step`, as DeepSpeed does it, and here it is only noted."""
        if self._zero is None:
            return self._clip_copies(max_norm)
        self._zero.clip_grad = max_norm or 0.0
        norm = self._averaged_norm().float() * self._ranks
        self._clipped_by = torch.ones_like(norm) if max_norm is None else clip_factor(norm, max_norm)
        return norm

    def _averaged_norm(self) -> Tensor:
        """Global norm of ZeRO's averaged gradients; infinite where it is not finite."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if self._stage < 3:
            return self._zero.scaled_global_norm()
        return combine_grad_norm_groups(self._zero._get_norm_groups())

    @torch.no_grad()
    def _clip_copies(self, max_norm: float | None) -> Tensor:
        """Without ZeRO each rank has whole gradients, but for experts of other ranks."""
        gradients = [p.grad for p in self._trained() if p.grad is not None]
        norm = self._norm([(is_expert(p), p.grad) for p in self._trained() if p.grad is not None]).float()
        if max_norm is not None:
            torch._foreach_mul_(gradients, clip_factor(norm, max_norm))  # type: ignore[reportPrivateImportUsage]
        return norm

    def _norm(self, gradients: Sequence[tuple[bool, Tensor]]) -> Tensor:
        """() float64 norm of whole gradients, those of experts (True) gathered from the ranks that hold others."""
        squares = torch.zeros(2, dtype=torch.float64, device=self._device)
        for expert, gradient in gradients:
            squares[int(expert)] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        if self.meshes.experts is not None:
            of_experts = squares[1].clone()
            dist.all_reduce(of_experts, group=self.meshes.experts.get_group("ep"))
            squares[1] = of_experts
        return squares.sum().sqrt()

    def grad_norms_by_parameter(self) -> dict[str, float]:
        from deepspeed.utils import safe_get_full_grad

        norms = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                gradient: Any = parameter.grad if self._zero is None else safe_get_full_grad(parameter)
                norm = self._norm([(is_expert(parameter), gradient)])
                norms[name] = float(norm if self._zero is None else norm * self._to_gradient)
        return norms

    @property
    def _to_gradient(self) -> Tensor:
        """What makes of ZeRO's averages the gradients with which `step` is going to be made."""
        return self._clipped_by * self._ranks

    def step(self) -> None:
        self._engine.step()
        self._has_gradients = False

    def zero_grad(self) -> None:
        self._clipped_by = torch.ones((), device=self._device)
        if self._has_gradients and self._zero is not None:
            self._forget()
        self._engine.zero_grad()
        self._has_gradients = False

    def _forget(self) -> None:
        """What ZeRO does with the gradients of a step that it skips itself."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
            zero.reset_cpu_buffers()
        if self._stage == 3:
            zero._pre_step()
            zero._partition_all_parameters()
            zero.averaged_gradients = {}
        else:
            from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

            zero.micro_step_id = INITIAL_MICRO_STEP_ID
            for gradients in (zero.averaged_gradients, zero.all_grad_tensors):  # in place: parameters refer to them
                gradients.update(dict.fromkeys(gradients))

    def save_beside(self, checkpoints: Path, step: int) -> None:
        """DeepSpeed's goes to the folder `deepspeed` beside ours, and is kept as long as ours of that step."""
        if not self._native:
            return
        folder, own = checkpoints.parent / "deepspeed", f"step-{step}"
        self._engine.save_checkpoint(str(folder), tag=own)
        if self.meshes.rank == 0:
            for tag in folder.glob("step-*"):
                if tag.name != own and not (checkpoints / tag.name).exists():  # ours of this step may be on its way
                    shutil.rmtree(tag, ignore_errors=True)
