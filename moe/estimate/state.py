"""Parameters, gradients and optimizer state of one rank, and the weights that it gathers or casts to compute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property

from .inventory import Held, Parameter, group_size, held
from .job import Job

PARAMETER_BYTES = 4  # float32, also under bf16
MOMENT_BYTES = 8  # AdamW: two moments in float32


@dataclass(frozen=True)
class State:
    """Bytes of some parameters on one rank.

    Attributes:
        parameters: stored in float32, sharded where FSDP manages them.
        trained: those of them that get a gradient and optimizer state.
        gradients: in float32, as the optimizer reads them.
        accumulated: gradients while micro-batches add up. FSDP reduces once a step, so until then they are whole, in
            float32; with engine.reduce_every_micro_batch they are shards.
        gathered: what FSDP has gathered while it is used: bfloat16 under bf16 but for embedding, norm and head.
        fresh: gradients of gathered weights as the backward pass makes them, in the precision of the gathered weights.
        sent: the float32 copy of them that FSDP reduces and scatters.
        summed, longest: gradients that the engine sums itself after the last backward pass, and the largest of them.
        cast: bfloat16 copies that autocast makes of other weights, which the graph keeps for the backward pass.
        cached: those of them that autocast caches until the forward pass ends, whatever is recomputed.
        largest: the largest gradient of one operation, new and whole; all experts of a layer are one operation.
    """

    parameters: float = 0.0
    trained: float = 0.0
    gradients: float = 0.0
    accumulated: float = 0.0
    gathered: float = 0.0
    fresh: float = 0.0
    sent: float = 0.0
    summed: float = 0.0
    longest: float = 0.0
    cast: float = 0.0
    cached: float = 0.0
    largest: float = 0.0

    def __add__(self, other: State) -> State:
        both = {name: getattr(self, name) + getattr(other, name) for name in _NAMES}
        greatest = {name: max(getattr(self, name), getattr(other, name)) for name in ("largest", "longest")}
        return State(**both | greatest)

    def __mul__(self, count: int) -> State:
        """Of so many layers."""
        both = {name: getattr(self, name) * count for name in _NAMES}
        return State(**both | {"largest": self.largest, "longest": self.longest})

    @property
    def optimizer(self) -> float:
        return self.trained / PARAMETER_BYTES * MOMENT_BYTES


_NAMES = tuple(item.name for item in fields(State))


class RankState:
    """State by layer kind and of the two ends, computed once for a job."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @classmethod
    def of(cls, job: Job) -> RankState:
        """The one of a job."""
        return job.remember(cls, lambda: cls(job))

    @cached_property
    def kinds(self) -> list[State]:
        """Of one layer of each kind."""
        return [self._of(placed) for placed in self.placed]

    @cached_property
    def placed(self) -> list[list[Held]]:
        """The parameters of one layer of each kind."""
        return [self._place(parameters) for parameters in self._job.workload.inventory.kinds]

    def _place(self, parameters: Iterable[Parameter]) -> list[Held]:
        precision = self._job.workload.plan.trainer.precision
        return [held(parameter, self._job.layout, precision) for parameter in parameters]

    @cached_property
    def first(self) -> State:
        return self._of(self._place(self._job.workload.inventory.first))

    @cached_property
    def last(self) -> State:
        return self._of(self._place(self._job.workload.inventory.last))

    def ends(self, rank: int) -> State:
        """Embedding, norm and head, as far as a pipeline rank has them."""
        state = self.first if self._job.has_first(rank) else State()
        return state + self.last if self._job.has_last(rank) else state

    def whole(self, rank: int) -> State:
        """Everything that a pipeline rank holds."""
        layers = self._job.layers_by_kind(rank).items()
        return sum((self.kinds[kind] * len(found) for kind, found in layers), self.ends(rank))

    def _of(self, placed: Iterable[Held]) -> State:
        placed = list(placed)
        experts = sum(4.0 * item.gathered for item in placed if item.parameter.is_expert and item.parameter.trained)
        return sum((self._one(item) for item in placed), State(largest=experts))

    def _one(self, item: Held) -> State:
        plan, width = self._job.workload.plan, self._job.workload.element_bytes
        stored, whole, trained = 4.0 * item.stored, 4.0 * item.gathered, item.parameter.trained
        halved = plan.trainer.precision == "bf16" and item.parameter.in_unit
        travels = float(width if halved else 4)
        casts = halved and item.parameter.is_product and not item.by_fsdp
        summed = stored if trained and not item.by_fsdp and not self._job.by_ddp and self._is_summed(item) else 0.0
        keeps_shards = plan.engine.reduce_every_micro_batch or not item.by_fsdp
        return State(
            parameters=stored,
            trained=stored if trained else 0.0,
            gradients=stored if trained else 0.0,
            accumulated=(stored if keeps_shards else whole) if trained else 0.0,
            gathered=travels * item.gathered if item.by_fsdp else 0.0,
            fresh=travels * item.gathered if item.by_fsdp and trained else 0.0,
            sent=whole if item.by_fsdp and trained else 0.0,
            summed=summed,
            longest=summed,
            cast=2.0 * item.gathered if casts else 0.0,
            cached=2.0 * item.gathered if casts and not item.parameter.is_expert and self._job.layout.tp == 1 else 0.0,
            largest=whole if trained else 0.0,
        )

    def _is_summed(self, item: Held) -> bool:
        """Whether other ranks have a part of its gradient."""
        return any(group_size(self._job.layout, name) > 1 for name in item.sums)
