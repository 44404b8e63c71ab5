"""One optimizer step after the other on a model that `DeepSpeedEngine.prepare` has handed to DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...meshes import Meshes
from .experts import Cut


class DeepSpeedTraining:
    def __init__(self, engine, part, optimizer, *, stage, meshes, device, cuts) -> None:
        self.parts = [part]
        self.optimizer = optimizer
        self.meshes = meshes
        self._engine = engine
        self._stage = stage
        self._device = device
        self._cuts = cuts
        self._zero = engine.optimizer if stage else None
        self._ranks = meshes.layout.data
        if self._zero is not None:
            self._zero.override_loss_scale(1.0 / self._ranks)

    def run(self, micro_batches, scale):
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            loss = self._engine(**micro_batch) * scale
            self._engine.backward(loss if self._zero is None else loss * self._ranks, scale_wrt_gas=False)
            total += loss.detach()
        if self._zero is None:
            torch._foreach_mul_([p.grad for p in self.parts[0].parameters() if p.grad is not None], float(self._ranks))
        return total

    def evaluate(self, micro_batch):
        with torch.no_grad():
            return self._engine(**micro_batch).detach().double()

    def named_parameters(self):
        return self.parts[0].named_parameters()

    def clip(self, max_norm):
        from ..gradients import clip_gradients
        if self._zero is None:
            raise NotImplementedError
        self._zero.clip_grad = max_norm or 0.0
        if self._stage < 3:
            norm = self._zero.scaled_global_norm()
        else:
            from deepspeed.runtime.utils import combine_grad_norm_groups
            norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        return norm.float() * self._ranks

    def step(self):
        self._engine.step()

    def zero_grad(self):
        self._engine.zero_grad()
