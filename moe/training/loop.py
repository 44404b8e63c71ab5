"""The training loop: one optimizer step after the other, and what has to happen between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...parallel.checkpoint import Checkpointer
from ...parallel.communication.watchdog import Watchdog
from ...parallel.engines.base import Engine
from ...parallel.meshes import Meshes
from ...parallel.process import Process, gather, sum_over_ranks
from ..context import StepContext
from ..data.batches import Batch, Batches
from ..layer import MoELayer
from .display import Display
from .evaluate import Evaluation, evaluate
from .optimizers import set_learning_rate
from .preemption import Preemption
from .progress import Progress
from .router_statistics import RouterStatistics, StepStatistics
from .schedules import Schedule
from .seeds import seed_everything
from .settings import TrainerSettings
from .sinks import MetricSinks
from .step_guard import FirstNonFiniteOutput, NonFiniteError, StepGuard, first_non_finite_gradient
from .throughput import Meter


@dataclass
class Loop:
    """Everything a run needs, put together by `run.train`."""

    engine: Engine
    process: Process
    meshes: Meshes
    watchdog: Watchdog
    settings: TrainerSettings
    schedule: Schedule
    peak_lr: float
    batches: Batches
    valid_batches: Callable[[int | None], Any]
    moe_layers: list[tuple[int, MoELayer]]  # of this rank
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
        self.guard = StepGuard(self.settings.max_skipped_steps, self.progress.skipped, self.progress.skipped_in_a_row)
        self.last_evaluation: Evaluation | None = None
        self._judged: tuple[int, float] | None = None  # step and loss by which checkpoints are compared
        self._saved_step = self.progress.step  # a resumed run has its checkpoint, a new one has nothing to save

    def run(self) -> bool:
        """Train to the last step. False if a signal or `stop_after` ended it before; the state is saved either way."""
        steps, progress = self.settings.steps, self.progress
        with Preemption() as preemption:
            self._evaluate_if_due()  # a run that was told to stop after a step has saved it first
            while progress.step < steps:
                if self._rests():
                    return False
                stop = self._step(preemption.requested)
                if stop and progress.step < steps:
                    self._save()
                    self.checkpointer.wait()
                    return False
                self._evaluate_if_due()
                if _due(progress.step, self.settings.checkpoint_every) and progress.step < steps:
                    self._save()
            self._evaluate_at_end()
            self._save()
            self.checkpointer.wait()
        return True

    def _rests(self) -> bool:
        """Whether the run is to stop after this step; if so, it is evaluated as during the run, and saved."""
        step, stop_after = self.progress.step, self.settings.stop_after
        if stop_after is None or step < stop_after:
            return False
        if self.progress.evaluated_step != step:
            self.evaluate(self._limit, judge=False)  # an uninterrupted run has no such evaluation to judge by
        self._save()
        self.checkpointer.wait()
        return True

    def evaluate(self, limit: int | None, judge: bool = True) -> Evaluation:
        """Evaluate on the validation split (or `limit` micro-batches of it per rank) and log the figures.

        Args:
            judge: whether the loss counts in choosing the best checkpoint; all that count are of the same text.
        """
        evaluation = evaluate(
            self.engine,
            self._watched(self.valid_batches(limit)),
            device=self.process.device,
            sum_over_ranks=sum_over_ranks,
            counts=self.meshes.is_data_main,
        )
        self.last_evaluation, self.progress.evaluated_step = evaluation, self.progress.step
        if judge:
            best = self.progress.best_valid_loss
            self.progress.best_valid_loss = evaluation.loss if best is None else min(best, evaluation.loss)
            self._judged = self.progress.step, evaluation.loss
        self._log({"step": self.progress.step, **evaluation.record()})
        self.meter.pause()
        return evaluation

    def _watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.watchdog.alive()
            yield batch
        self.watchdog.alive()

    def _evaluate_if_due(self) -> None:
        step = self.progress.step
        is_new = self.progress.evaluated_step != step and 0 < step < self.settings.steps
        if is_new and _due(step, self.settings.eval_every):
            self.evaluate(self._limit)

    def _evaluate_at_end(self) -> None:
        """Once more as during the run, to be compared with it, and on the whole validation text."""
        if self.settings.eval_every and self._limit is not None:
            self.evaluate(self._limit)
            self.evaluate(None, judge=False)
        else:
            self.evaluate(None)

    @property
    def _limit(self) -> int | None:
        """Micro-batches per rank of an evaluation during the run."""
        batches = self.settings.eval_batches
        return None if batches is None else batches * self.batches.micro_batches

    def _step(self, stop_requested: bool) -> bool:
        """One optimizer step; returns whether any rank was asked to stop."""
        step = self.progress.step
        self.watchdog.alive()
        seed_everything(self.seed, "step", step, self.process.rank)
        micro_batches = self.batches.step(step)
        loss_share = self.engine.run(
            [self._arguments(batch) for batch in micro_batches], scale=1.0 / self.batches.targets_per_step
        )
        num_bytes = sum(batch.num_bytes for batch in micro_batches) if self.meshes.is_data_main else 0
        shares = torch.stack([loss_share, loss_share.new_tensor(stop_requested), loss_share.new_tensor(num_bytes)])
        loss, stops, num_bytes = sum_over_ranks(shares).tolist()
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
        self.progress.skipped, self.progress.skipped_in_a_row = self.guard.skipped, self.guard.in_a_row
        bits_per_byte = loss * self.batches.targets_per_step / math.log(2.0) / max(num_bytes, 1.0)
        figures = {"loss": loss, "train_bits_per_byte": bits_per_byte, "grad_norm": grad_norm, "lr": lr}
        self._log_step(figures, statistics)
        return stops > 0

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        """What the model's forward pass gets of a micro-batch."""
        context = StepContext(
            num_sequences=batch.tokens.shape[0],
            global_tokens=self.batches.tokens_per_step,
            statistics=self.statistics,
        )
        return {**batch.arguments(self.process.device), "context": context}

    def _finish_routers(self, statistics: StepStatistics) -> None:
        for index, layer in self.moe_layers:
            layer.router.finish_step(statistics.counts[statistics.layers.index(index)])

    def _describe_non_finite(self, step: int, loss: float, grad_norm: float, batches: list[Batch]) -> str:
        """Name step, batch and layer. Runs a forward pass, so every rank must call it."""
        gradient = first_non_finite_gradient(self.engine.grad_norms_by_parameter())
        with FirstNonFiniteOutput(self.engine.parts) as forward:
            for batch in batches:
                self.engine.evaluate(batch.arguments(self.process.device))
        output = next((name for name in gather(forward.name) if name is not None), None)
        where = f"first in the output of {output}" if output else f"first in the gradient of {gradient}"
        first = self.progress.samples
        return (
            f"step {step}, samples {first} to {first + self.batches.global_batch_size - 1}: loss {loss}, gradient norm "
            f"{grad_norm}, {where}; {self.guard.in_a_row} steps in a row were skipped "
            f"(trainer.max_skipped_steps={self.guard.limit})"
        )

    def _log_step(self, figures: dict[str, float], statistics: StepStatistics) -> None:
        speed = self.meter.step(self.batches.tokens_per_step)
        step, is_last = self.progress.step, self.progress.step == self.settings.steps
        self.progress.seconds += self.meter.last_seconds
        if is_last or _due(step, self.settings.log_every):
            record = {"step": step, **figures, **speed, "tokens": self.progress.tokens}
            self._log({**record, "skipped_steps": self.guard.skipped, **statistics.summary()})
        if statistics.layers and (is_last or _due(step, self.expert_every)):
            self.sinks.log_experts(step, statistics.per_layer())

    def _log(self, record: dict[str, Any]) -> None:
        self.sinks.log(record)
        self.display.update(record)

    def _save(self) -> None:
        """Write a checkpoint of this step, unless it is there already."""
        step = self.progress.step
        if self._saved_step == step:
            return
        evaluation = self.last_evaluation if self.progress.evaluated_step == step else None
        meta = {
            **self.checkpoint_meta,
            "progress": asdict(self.progress),
            "evaluation": evaluation.record() if evaluation else None,
            "finished": step == self.settings.steps,
        }
        metric = self._judged[1] if self._judged is not None and self._judged[0] == step else None
        self.checkpointer.save(step, self.engine.state_dict(), meta, metric=metric)
        self.engine.save_beside(self.checkpointer.folder, step)
        self._saved_step = step
        self.meter.pause()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
