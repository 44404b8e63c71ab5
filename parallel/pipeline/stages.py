"""Which layers are in which pipeline stage, and what a pipeline schedule asks for: known before any process starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...kernels.errors import ConfigError


@dataclass(frozen=True)
class _Rule:
    """What a schedule needs.

    Attributes:
        virtual: how many parts of the model it runs on each rank, where nothing is said.
        least, most: how many it can run.
        rounds: whether micro-batches go through in rounds of pp, so that their number must be a multiple.
        splits_backward: whether gradients of inputs and of weights are computed apart.
        is_v: whether parts are dealt out there and back, so that the first and the last are on the first rank.
    """

    virtual: int = 1
    least: int = 1
    most: int | None = 1
    rounds: bool = False
    splits_backward: bool = False
    is_v: bool = False


_RULES = {
    "1f1b": _Rule(),
    "gpipe": _Rule(),
    "interleaved": _Rule(virtual=2, least=2, most=None, rounds=True),
    "zero_bubble": _Rule(most=None, rounds=True, splits_backward=True),
    "zero_bubble_v": _Rule(virtual=2, least=2, most=2, splits_backward=True, is_v=True),
}
SCHEDULES = tuple(_RULES)


@dataclass(frozen=True)
class PipelineSchedule:
    """In which order a rank runs its parts of the model over the micro-batches of a step.

    A part is a run of consecutive layers; a rank has `virtual` of them. docs/pipeline.md compares the schedules.

    Attributes:
        name: gpipe (1811.06965): all forward passes, then all backward passes. 1f1b (2104.04473, section 2.2): in turn,
            so that at most pp micro-batches are in flight. interleaved (2104.04473, section 2.2): 1f1b over several
            parts a rank. zero_bubble (2401.10241, ZB1P): interleaved, where gradients of weights wait for idle time.
            zero_bubble_v (2401.10241, section 6): the same with two parts a rank, there and back.
        virtual_stages: parts on each rank; None for as many as the schedule is meant for.

    Raises: ConfigError for an unknown schedule or a number of parts that it cannot run.
    """

    name: str = "1f1b"
    virtual_stages: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _RULES:
            raise ConfigError(f"engine.pipeline_schedule={self.name!r} is unknown, allowed: {', '.join(SCHEDULES)}")
        rule, given = self._rule, self.virtual_stages
        if given is not None and not rule.least <= given <= (rule.most or given):
            allowed = f"{rule.least} or more" if rule.most is None else str(rule.least)
            raise ConfigError(
                f"engine.virtual_stages={given} with engine.pipeline_schedule={self.name}, allowed: {allowed}"
            )

    @property
    def virtual(self) -> int:
        """Parts on each rank."""
        return self._rule.virtual if self.virtual_stages is None else self.virtual_stages

    def stages(self, pp: int) -> int:
        """Parts into which the model is cut over `pp` ranks; 1 for one rank, whatever the schedule."""
        return 1 if pp == 1 else pp * self.virtual

    def rank_of(self, stage: int, pp: int) -> int:
        """The rank that holds a part."""
        lap, place = divmod(stage, pp)
        return pp - 1 - place if self._rule.is_v and lap % 2 else place

    def stages_of(self, rank: int, pp: int) -> tuple[int, ...]:
        """The parts that a rank holds, in the order of the layers."""
        return tuple(stage for stage in range(self.stages(pp)) if self.rank_of(stage, pp) == rank)

    def check(self, pp: int, micro_batches: int, checkpointing: str = "none", compiled: bool = False) -> None:
        """Say before the start that a step of so many micro-batches cannot run.

        Raises: ConfigError for too few micro-batches, an uneven number of them, or an option that a split backward pass
            does not go with.
        """
        if pp == 1:
            return
        allowed = None
        if self._rule.rounds and micro_batches % pp:
            allowed = f"a multiple of {pp}"
        elif micro_batches < pp and self.name != "gpipe":
            allowed = f"{pp} or more, or engine.pipeline_schedule=gpipe"
        if allowed is not None:
            shown = "1 micro-batch" if micro_batches == 1 else f"{micro_batches} micro-batches"
            raise ConfigError(
                f"engine.pipeline_schedule={self.name} over layout.pp={pp} with {shown} a step "
                f"(from data.global_batch_size and data.micro_batch_size), allowed: {allowed}"
            )
        if self._rule.splits_backward and checkpointing != "none":
            raise ConfigError(
                f"trainer.activation_checkpointing={checkpointing} with engine.pipeline_schedule={self.name}, which "
                "would recompute a layer once per weight, allowed: none, or another schedule"
            )
        if self._rule.splits_backward and compiled:
            raise ConfigError(
                f"trainer.compile=true with engine.pipeline_schedule={self.name}, which runs a backward pass in two "
                "halves, allowed: false, or another schedule"
            )

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights are computed apart."""
        return self._rule.splits_backward

    @property
    def _rule(self) -> _Rule:
        return _RULES[self.name]


def split_layers(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Cut a row of layers into stages whose costs are as equal as can be.

    A pipeline is as slow as its slowest stage, so the largest cost is minimised first; of all splits with that largest
    cost, one with the least sum of squares; of these, one with short stages in front, where more micro-batches are in
    flight.

    Args:
        costs: of each layer.
        first, last: what comes before the first layer (embedding) and after the last (norm, head and loss).

    Returns: the layers of each stage, at least one.
    Raises: ConfigError for more stages than layers.
    """
    layers = len(costs)
    if stages > layers:
        raise ConfigError(
            f"layout.pp x engine.virtual_stages = {stages} stages for model.layers={layers}, allowed: up to {layers}"
        )
    sums = list(itertools.accumulate(costs, initial=0.0))

    def cost(start: int, stop: int) -> float:
        return sums[stop] - sums[start] + (first if start == 0 else 0.0) + (last if stop == layers else 0.0)

    largest = _cut(layers, stages, cost, max)[0]
    bound = largest * (1 + 1e-9)

    def square(start: int, stop: int) -> float:
        return cost(start, stop) ** 2 if cost(start, stop) <= bound else math.inf

    cuts = _cut(layers, stages, square, lambda one, other: one + other)[1]
    return [range(start, stop) for start, stop in zip([0, *cuts], [*cuts, layers])]


def _cut(layers, stages, cost, add) -> tuple[float, list[int]]:
    """The least total over all ways to cut, and where it cuts, by dynamic programming over the stages in front."""
    best = [(cost(0, stop), []) if stop else (math.inf, []) for stop in range(layers + 1)]
    for _ in range(stages - 1):
        longer: list[tuple[float, list[int]]] = [(math.inf, [])] * (layers + 1)
        for stop in range(1, layers + 1):
            for start in range(1, stop):  # ties go to the first, and so to a short front
                total = add(best[start][0], cost(start, stop))
                if total < longer[stop][0]:
                    longer[stop] = total, [*best[start][1], start]
        best = longer
    return best[layers]
