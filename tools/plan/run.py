"""`scatterfold plan`: search, show, write."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ...moe.estimate import SIZES, Candidate, Device, Workload, search
from ...moe.estimate.devices import with_nodes
from ...moe.training.display import quantity
from ..files import check_target, write_atomically
from .calibration import choose_device
from .configuration import compose, given_sizes, read
from .cost import Cost
from .table import print_table

if TYPE_CHECKING:
    from .command import Plan

FORMAT = "scatterfold plan 1"


def run(settings: Plan, overrides: list[str]) -> int:
    """The command; returns its exit code."""
    device = with_nodes(choose_device(settings.device, settings.gpus), settings.gpus_per_node)
    config = compose(overrides)
    plan = read(config)
    check_target(settings.json)
    workload = Workload.of(plan, device.kind)
    found = search(workload, settings.gpus, device, given_sizes(overrides, plan), settings.imbalance)
    cost = Cost(settings.gpus, settings.tokens, settings.price_per_hour)
    print(_header(workload, settings.gpus, device, found))
    print_table(found[: settings.top], cost, len(found))
    print(_remarks(found, device))
    if settings.json is not None:
        write_atomically(settings.json, json.dumps(_document(workload, settings, device, found, cost), indent=1) + "\n")
    return 0


def _header(workload: Workload, gpus: int, device: Device, found: list[Candidate]) -> str:
    counts, data, trainer = workload.counts, workload.plan.data, workload.plan.trainer
    fit = sum(not candidate.refused for candidate in found)
    speeds = "measured on this machine" if device.measured else "ASSUMED shares of the vendor's figures"
    engine = workload.plan.engine
    return "\n".join(
        (
            f"model    {quantity(counts.total)} parameters, {quantity(counts.active)} active for a token, "
            f"{counts.flops_per_token:.3g} FLOPs a token (forward and backward)",
            f"batch    {data.global_batch_size:,} sequences of {data.sequence_length:,} tokens, {trainer.precision}, "
            f"activation checkpointing {trainer.activation_checkpointing}, "
            f"reshard_after_forward {str(engine.reshard_after_forward).lower()}",
            f"devices  {gpus} x {device.name}, {device.ranks_per_node} a machine; speeds are {speeds}",
            f"layouts  {len(found)} are legal, {fit} fit\n",
        )
    )


def _remarks(found: list[Candidate], device: Device) -> str:
    """What the best layouts with and without expert parallelism differ by, and what does not fit, and why."""
    lines = [""]
    fitting = [candidate for candidate in found if not candidate.refused]
    spread = next((candidate for candidate in fitting if candidate.layout.ep > 1), None)
    local = next((candidate for candidate in fitting if candidate.layout.ep == 1), None)
    if spread and local:
        ratio = local.time.total / spread.time.total
        faster = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"slower, {ratio:.2f} times as fast as"
        lines.append(f"Best with ep above 1 ({sizes(spread)}) is {faster} the best with ep=1 ({sizes(local)}).")
    if len(fitting) < len(found):
        nearest = found[len(fitting)]
        lines.append(f"Nearest that does not fit: {sizes(nearest)}: {nearest.refused}.")
    if device.memory is not None:
        lines.append(
            f"Memory is what torch allocates on the fullest rank; {device.reserved / 2**30:.1f} GiB of "
            f"{device.memory / 2**30:.0f} are left for context, communicators and fragmentation."
        )
    lines.append("Estimates, of formulas that docs/plan.md states with their measured errors.")
    return "\n".join(lines)


def sizes(candidate: Candidate) -> str:
    """A layout as words of a command."""
    found = [f"{name}={getattr(candidate.layout, name)}" for name in SIZES if getattr(candidate.layout, name) > 1]
    return " ".join(found) or "dp_replicate=1"


def _document(workload: Workload, settings: Plan, device: Device, found: list[Candidate], cost: Cost) -> dict[str, Any]:
    counts = workload.counts
    return {
        "format": FORMAT,
        "gpus": settings.gpus,
        "device": {"name": device.name, "measured": device.measured, "source": device.source},
        "gpus_per_node": device.ranks_per_node,
        "model": {
            "parameters": counts.total,
            "active_parameters": counts.active,
            "flops_per_token": counts.flops_per_token,
        },
        "layouts": [candidate.as_dict() | cost.as_dict(candidate.time) for candidate in found],
    }
