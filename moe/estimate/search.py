"""Every layout in which a configuration can run on so many ranks, estimated and ranked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from ...kernels.errors import ConfigError, InputError
from ...parallel.layout import Layout, ResolvedLayout
from .communication import volume
from .devices import Device
from .job import Job, Workload
from .memory import Memory, peak_memory
from .step_time import StepTime, step_time

SIZES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")


@dataclass(frozen=True)
class Candidate:
    """A layout and what it needs.

    Attributes:
        memory: of the rank that holds the most.
        volume: bytes that a rank sends in a step, by kind, inside of its machine and between machines.
        time: of a step.
        refused: why it does not fit; empty if it does.
    """

    layout: ResolvedLayout
    memory: Memory
    volume: dict[str, dict[str, float]]
    time: StepTime
    refused: str = ""

    @property
    def order(self) -> tuple:
        """What fits comes first, by speed; then by memory. Equal ones by fewer cuts: always the same order."""
        sizes = tuple(getattr(self.layout, name) for name in SIZES)
        cuts = sum(size > 1 for size in sizes)
        if self.refused:
            return (1, self.memory.total, cuts, sizes)
        return (0, -self.time.tokens_per_second, cuts, sizes)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "layout": {**asdict(self.layout), "edp": self.layout.edp},
            "fits": not self.refused,
            "refused": self.refused,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "bytes_sent": self.volume,
            "time": self.time.as_dict(),
        }


def legal_layouts(workload: Workload, world: int, fixed: Mapping[str, int] | None = None) -> Iterator[ResolvedLayout]:
    """All that training accepts (`Workload.resolve`), those with fewer stages first.

    Cuts of the experts only add conditions, so they are not tried where attention cannot be cut that way.

    Args:
        fixed: sizes that are given, by their names in the config group `layout`.
    """
    fixed = {name: size for name, size in (fixed or {}).items() if size is not None}

    def choices(name: str, of: int) -> list[int]:
        found = [size for size in range(1, of + 1) if of % size == 0]
        return [size for size in found if fixed.get(name, size) == size]

    for pp in choices("pp", world):
        for dp_replicate in choices("dp_replicate", world // pp):
            rest = world // pp // dp_replicate
            for dp_shard in choices("dp_shard", rest):
                for cp in choices("cp", rest // dp_shard):
                    for tp in choices("tp", rest // dp_shard // cp):
                        if dp_shard * cp * tp != rest:
                            continue
                        attention = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp, "pp": pp}
                        if _resolved(workload, world, attention) is None:
                            continue
                        for ep in choices("ep", world // pp):
                            for etp in choices("etp", world // pp // ep):
                                layout = _resolved(workload, world, {**attention, "ep": ep, "etp": etp})
                                if layout is not None:
                                    yield layout


def _resolved(workload: Workload, world: int, sizes: Mapping[str, int]) -> ResolvedLayout | None:
    try:
        return workload.resolve(Layout(**sizes), world)
    except InputError:
        return None


def evaluate(workload: Workload, layout: ResolvedLayout, device: Device, imbalance: float = 1.0) -> Candidate:
    """Memory, messages and time of one layout."""
    job = Job(workload, layout, imbalance)
    memory = peak_memory(job)
    sent, time = volume(job, device.ranks_per_node), step_time(job, device)
    return Candidate(layout, memory, sent, time, _refusal(memory, device))


def search(
    workload: Workload,
    world: int,
    device: Device,
    fixed: Mapping[str, int] | None = None,
    imbalance: float = 1.0,
) -> list[Candidate]:
    """All legal layouts, the best first. Raises: ConfigError if there is none, with the reason of data parallelism."""
    layouts = list(legal_layouts(workload, world, fixed))
    if not layouts:
        given = ", ".join(f"layout.{name}={size}" for name, size in (fixed or {}).items())
        try:
            workload.resolve(Layout(**(fixed or {})), world)
        except InputError as error:
            raise ConfigError(
                f"no layout of gpus={world} is legal{' with ' + given if given else ''}: {error}"
            ) from None
        raise ConfigError(f"no layout of gpus={world} is legal with {given}, allowed: other sizes, or another batch")
    found = [evaluate(workload, layout, device, imbalance) for layout in layouts]
    return sorted(found, key=lambda candidate: candidate.order)


def _refusal(memory: Memory, device: Device) -> str:
    if device.usable is None or memory.total <= device.usable:
        return ""
    part, size = max(memory.by_part().items(), key=lambda item: item[1])
    return (
        f"{memory.total / 2**30:.0f} of {device.usable / 2**30:.0f} GiB at the {memory.moment}, "
        f"{size / 2**30:.0f} of them {part}"
    )
