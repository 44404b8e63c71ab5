"""Pipeline parallelism: a model in parts on different ranks, run by the schedules of torch.distributed.pipelining."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining as pipelining
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from ...kernels.errors import ConfigError, InputError
from ..meshes import Meshes
from .stages import PipelineSchedule
from .torch_pipelining import Stage, can_split_backward

_CLASSES = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zero_bubble": pipelining.ScheduleInterleavedZeroBubble,
    "zero_bubble_v": pipelining.ScheduleZBVZeroBubble,
}

MicroBatch = Mapping[str, Any]
ForwardContext = Callable[[], AbstractContextManager[None]]


class Pipeline:
    """Runs the parts that this rank holds over the micro-batches of a step, together with the other ranks of `pp`.

    A part is a module that is called as `part(**micro_batch)`, or `part(**micro_batch, received=hidden)` with what the
    part before it returned, and has `hidden_shape(tokens)`, the shape of what it returns. The last one returns a loss
    to be summed. Every rank of the pipeline gets the same micro-batches whole; what passes between ranks is hidden
    states and their gradients, in the type of the parameters.

    Auxiliary losses hang on the hidden states (`moe.inject`), so their gradients arise in each part when the gradient
    of the loss comes back. Parts that FSDP shards reduce their gradients once, after the last micro-batch.

    Args:
        parts: of this rank, in the order of the layers, as `schedule.stages_of` numbers them.
        meshes: with pp above 1.
        schedule: which order.
        device: of the parts.
        forward_context: around each forward pass, such as autocast.

    Raises: ConfigError for a split backward pass where this version of torch cannot do it.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        meshes: Meshes,
        schedule: PipelineSchedule,
        device: torch.device,
        forward_context: ForwardContext = contextlib.nullcontext,
    ) -> None:
        assert meshes.pp is not None  # one stage needs no pipeline
        if schedule.splits_backward and not can_split_backward():
            raise ConfigError(
                f"engine.pipeline_schedule={schedule.name} needs torch 2.13, but this is {torch.__version__}, "
                "allowed: another schedule"
            )
        self.schedule = schedule
        self._pp, self._rank = meshes.layout.pp, meshes.coordinates.pp
        self._group = meshes.pp.get_group()
        self._stages = schedule.stages(self._pp)
        self._parts = dict(zip(schedule.stages_of(self._rank, self._pp), parts, strict=True))
        self._device, self._forward_context = device, forward_context
        self._dtype = next(parts[0].parameters()).dtype
        self._prepared: dict[tuple[int, tuple[int, ...]], tuple[Any, list[Stage]]] = {}
        self._scale = 1.0

    def run(self, micro_batches: Sequence[MicroBatch], scale: float) -> Tensor:
        """Forward and backward of all micro-batches, each loss times `scale`; gradients add up.

        Returns: () float64 sum of the scaled losses on the rank of the last part, 0 on the others.
        Raises: ValueError for micro-batches of different shapes; an InputError of a part as it is.
        """
        shapes = {self._hidden_shape(micro_batch) for micro_batch in micro_batches}
        if len(shapes) != 1:
            raise ValueError(f"the micro-batches of a step have shapes {sorted(shapes)}, a pipeline needs one shape")
        schedule, stages = self._prepare(len(micro_batches), shapes.pop())
        for stage in stages:
            stage.micro_batches = micro_batches
        self._scale = scale
        numbers, losses = torch.arange(len(micro_batches)), []
        try:
            schedule.step(number=numbers, target=numbers, losses=losses, return_outputs=False)
        except RuntimeError as error:  # torch wraps what a part raises
            if isinstance(error.__cause__, InputError):
                raise error.__cause__ from None
            raise
        finally:
            for stage in stages:
                stage.micro_batches = ()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for loss in losses:
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, micro_batch: MicroBatch) -> Tensor:
        """Forward of one micro-batch through all parts; ranks in front can go on while those behind still compute.

        Returns: () float64 loss on the rank of the last part, 0 on the others.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        previous: Tensor | None = None
        sent: list[tuple[Any, Tensor]] = []  # tensors must live until they have left
        for number, part in self._parts.items():
            options = {} if number == 0 else {"received": self._receive(number, previous, micro_batch)}
            with self._forward_context():
                previous = out = part(**micro_batch, **options)
            if number == self._stages - 1:
                total += out
            elif (peer := self._rank_of(number + 1)) != self._rank:
                out = out.contiguous()
                sent.append((dist.isend(out, group=self._group, group_dst=peer), out))
        for work, _ in sent:
            work.wait()
        return total

    def _receive(self, number: int, previous: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        """The input of a part: from another rank, or from the part before it on this one."""
        peer = self._rank_of(number - 1)
        if peer == self._rank:
            assert previous is not None  # only neighbouring parts of a V are on one rank
            return previous
        received = torch.empty(self._hidden_shape(micro_batch), dtype=self._dtype, device=self._device)
        dist.recv(received, group=self._group, group_src=peer)
        return received

    def _prepare(self, count: int, shape: tuple[int, ...]) -> tuple[Any, list[Stage]]:
        """The schedule for so many micro-batches of that shape, made at its first use."""
        if (count, shape) not in self._prepared:
            stages = [
                Stage(
                    part,
                    number,
                    self._stages,
                    self._device,
                    self._group,
                    hidden=torch.empty(shape, dtype=self._dtype, device="meta"),
                    forward_context=self._forward_context,
                )
                for number, part in self._parts.items()
            ]
            kind = _CLASSES[self.schedule.name]
            options: dict[str, Any] = {"loss_fn": self._scaled, "scale_grads": False}
            if issubclass(kind, PipelineScheduleSingle):
                schedule = kind(stages[0], count, **options)
            else:
                assert issubclass(kind, PipelineScheduleMulti)
                schedule = kind(stages, count, **options)  # type: ignore[arg-type]
            self._prepared[count, shape] = schedule, stages
        return self._prepared[count, shape]

    def _scaled(self, loss: Tensor, number: Tensor) -> Tensor:
        return loss * self._scale

    def _rank_of(self, stage: int) -> int:
        return self.schedule.rank_of(stage, self._pp)

    def _hidden_shape(self, micro_batch: MicroBatch) -> tuple[int, ...]:
        part: Any = next(iter(self._parts.values()))
        return tuple(part.hidden_shape(micro_batch["tokens"]))
