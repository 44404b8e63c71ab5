"""The training loop: one optimizer step after the other, and what has to happen between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...parallel.checkpoint import Checkpointer
from ...parallel.engines.base import Engine
from ...parallel.process import Process, sum_over_ranks
from ..context import StepContext
from ..data.batches import Batch, Batches
from ..layer import MoELayer
from .display import Display
from .evaluate import Evaluation, evaluate
from .optimizers import set_learning_rate
from .preemption import Preemption
from .router_statistics import RouterStatistics, StepStatistics
from .schedules import Schedule
from .seeds import seed_everything
from .settings import TrainerSettings
from .sinks import MetricSinks
from .step_guard import FirstNonFiniteOutput, NonFiniteError, StepGuard, first_non_finite_gradient
from .throughput import Meter


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint.

    Attributes:
        step: optimizer steps done; the next one has this number, counting from 0.
        samples: sequences consumed, the position in the data.
        tokens: tokens consumed.
        skipped: steps that were skipped because a value was not finite.
        best_valid_loss: lowest validation loss so far.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    best_valid_loss: float | None = None


@dataclass
class Loop:
    """Everything a run needs, put together by `run.train`."""

    engine: Engine
    process: Process
    settings: TrainerSettings
    schedule: Schedule
    peak_lr: float
    batches: Batches
    valid_batches: Callable[[int | None], Any]
    moe_layers: list[tuple[int, MoELayer]]
    statistics: RouterStatistics
    checkpointer: Checkpointer
    sinks: MetricSinks
    display: Display
    meter: Meter
    checkpoint_meta: dict[str, Any]
    progress: Progress
    seed: int
    expert_every: int = 0

    def __post_init__(self) -> None:
        self.guard = StepGuard(self.settings.max_skipped_steps, self.progress.skipped)
        self.last_evaluation: Evaluation | None = None
        self._saved_step: int | None = None

    def run(self) -> bool:
        """Train to the last step. False if a signal asked to stop before; the state is saved either way."""
        settings = self.settings
        with Preemption() as preemption:
            while self.progress.step < settings.steps:
                stop = self._step(preemption.requested)
                step = self.progress.step
                if stop:
                    self._save()
                    self.checkpointer.wait()
                    return False
                if _due(step, settings.eval_every) and step < settings.steps:
                    self.evaluate(settings.eval_batches)
                if _due(step, settings.checkpoint_every) and step < settings.steps:
                    self._save()
        if self.last_evaluation is None or settings.eval_batches is not None or self._evaluated_step != settings.steps:
            self.evaluate(None)
        self._save()
        self.checkpointer.wait()
        return True

    def evaluate(self, limit: int | None) -> Evaluation:
        """Evaluate on the validation split (or `limit` batches of it per rank) and log the figures."""
        evaluation = evaluate(
            self.engine.model,
            self.valid_batches(limit),
            device=self.process.device,
            sum_over_ranks=sum_over_ranks,
            forward_context=self.engine.evaluation_context,
        )
        self.last_evaluation, self._evaluated_step = evaluation, self.progress.step
        best = self.progress.best_valid_loss
        if best is None or evaluation.loss < best:
            self.progress.best_valid_loss = evaluation.loss
        self._log({"step": self.progress.step, **evaluation.record()})
        self.meter.pause()
        return evaluation

    def _step(self, stop_requested: bool) -> bool:
        """One optimizer step; returns whether any rank was asked to stop."""
        step = self.progress.step
        seed_everything(self.seed, "step", step, self.process.rank)
        micro_batches = self.batches.step(step)
        loss_sum = self._forward_backward(micro_batches)
        totals = sum_over_ranks(torch.stack([loss_sum, loss_sum.new_tensor(float(stop_requested))]))
        loss, stops = totals.tolist()
        grad_norm = float(self.engine.clip(self.settings.gradient_clip))
        statistics = self.statistics.reduce(sum_over_ranks)
        lr = self.peak_lr * self.schedule(step, self.settings.steps)
        if self.guard.allows(loss, grad_norm):
            set_learning_rate(self.engine.optimizer, lr)
            self.engine.step()
            self._finish_routers(statistics)
        elif self.guard.exhausted:
            raise NonFiniteError(self._describe_non_finite(step, loss, grad_norm, micro_batches))
        else:
            self.display.message(f"step {step}: loss {loss}, gradient norm {grad_norm}: skipped")
        self.engine.zero_grad()
        self.progress.step = step + 1
        self.progress.samples += self.batches.global_batch_size
        self.progress.tokens += self.batches.tokens_per_step
        self.progress.skipped = self.guard.skipped
        self._log_step({"loss": loss, "grad_norm": grad_norm, "lr": lr}, statistics)
        return stops > 0

    def _forward_backward(self, micro_batches: list[Batch]) -> Tensor:
        """Accumulate gradients of the mean loss over the global batch; returns this rank's share of that mean.

        One rule for scale: each micro-batch contributes its summed loss divided by the global number of targets, and
        every reduction over ranks is a plain sum.
        """
        device = self.process.device
        loss_sum = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        for index, batch in enumerate(micro_batches):
            context = StepContext(
                num_sequences=batch.tokens.shape[0],
                global_tokens=self.batches.tokens_per_step,
                statistics=self.statistics,
            )
            with self.engine.forward_context(last_micro_batch=index == len(micro_batches) - 1):
                loss = self.engine.model(
                    batch.tokens.to(device, non_blocking=True),
                    batch.labels.to(device, non_blocking=True),
                    cu_seqlens=batch.cu_seqlens,
                    context=context,
                )
            loss = loss / self.batches.targets_per_step
            self.engine.backward(loss)
            loss_sum += loss.detach()
        return loss_sum

    def _finish_routers(self, statistics: StepStatistics) -> None:
        for row, (_, layer) in enumerate(self.moe_layers):
            layer.router.finish_step(statistics.counts[row])

    def _describe_non_finite(self, step: int, loss: float, grad_norm: float, batches: list[Batch]) -> str:
        """Name step, batch and layer. Runs a forward pass, so every rank must call it."""
        gradient = first_non_finite_gradient(self.engine.grad_norms_by_parameter())
        with FirstNonFiniteOutput(self.engine.module) as forward, torch.no_grad():
            for batch in batches:
                with self.engine.evaluation_context():
                    self.engine.model(
                        batch.tokens.to(self.process.device),
                        batch.labels.to(self.process.device),
                        cu_seqlens=batch.cu_seqlens,
                    )
        where = f"first in the output of {forward.name}" if forward.name else f"first in the gradient of {gradient}"
        first = self.progress.samples
        return (
            f"step {step}, samples {first} to {first + self.batches.global_batch_size - 1}: loss {loss}, gradient norm "
            f"{grad_norm}, {where}; {self.guard.in_a_row} steps in a row were skipped "
            f"(trainer.max_skipped_steps={self.guard.limit})"
        )

    def _log_step(self, figures: dict[str, float], statistics: StepStatistics) -> None:
        speed = self.meter.step(self.batches.tokens_per_step)
        step = self.progress.step
        if _due(step, self.settings.log_every) or step == self.settings.steps:
            record = {"step": step, **figures, **speed, "tokens": self.progress.tokens}
            self._log({**record, "skipped_steps": self.guard.skipped, **statistics.summary()})
        if self.moe_layers and (_due(step, self.expert_every) or step == self.settings.steps):
            self.sinks.log_experts(step, [index for index, _ in self.moe_layers], statistics)

    def _log(self, record: dict[str, Any]) -> None:
        self.sinks.log(record)
        self.display.update(record)

    def _save(self) -> None:
        """Write a checkpoint of this step, unless it is there already."""
        step = self.progress.step
        if self._saved_step == step:
            return
        evaluated_now = self.last_evaluation is not None and self._evaluated_step == step
        metric = self.last_evaluation.loss if evaluated_now and self.last_evaluation else None
        meta = {**self.checkpoint_meta, "progress": asdict(self.progress), "seed": self.seed}
        self.checkpointer.save(step, self.engine.state_dict(), meta, metric=metric)
        self._saved_step = step
        self.meter.pause()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
