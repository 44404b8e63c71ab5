"""`scatterfold plan`: search, show, write."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ...moe.estimate import Candidate, Device, Workload, search
from ...moe.estimate.devices import with_nodes
from ...moe.training.display import quantity
from ..files import check_target, write_atomically
from .calibration import choose_device
from .configuration import compose, given_sizes, read
from .cost import Cost
from .table import details, layout_words, print_table

if TYPE_CHECKING:
    from .command import Plan

FORMAT = "scatterfold plan 1"
REFUSED = 3  # layouts that do not fit and are named with the reason; the file has all


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
    print(f"\n{details(found[0])}")
    print("\n".join(["", *_remarks(found, device)]))
    if settings.json is not None:
        write_atomically(settings.json, json.dumps(_document(workload, settings, device, found, cost), indent=1) + "\n")
    return 0


def _header(workload: Workload, gpus: int, device: Device, found: list[Candidate]) -> str:
    counts, data, trainer = workload.counts, workload.plan.data, workload.plan.trainer
    fit = sum(not candidate.refused for candidate in found)
    speeds = f"measured ({device.source})" if device.measured else "ASSUMED shares of the vendor's figures"
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


def _remarks(found: list[Candidate], device: Device) -> list[str]:
    """What cutting experts gains or costs, what does not fit and why, and what the figures are."""
    fitting = [candidate for candidate in found if not candidate.refused]
    lines = [*_experts_apart(fitting), *_refused(found[len(fitting) :])]
    if device.memory is not None:
        reserved, whole = (size / 2**30 for size in (device.reserved, device.memory))
        lines.append(
            f"Memory is what torch allocates; {reserved:.1f} of {whole:.0f} GiB are left for context, communicators "
            "and fragmentation."
        )
    return [*lines, "These are estimates; docs/plan.md states the formulas and their measured errors."]


def _experts_apart(fitting: list[Candidate]) -> list[str]:
    spread = next((candidate for candidate in fitting if candidate.layout.ep * candidate.layout.etp > 1), None)
    local = next((candidate for candidate in fitting if candidate.layout.ep * candidate.layout.etp == 1), None)
    if spread is None or local is None:
        return []
    gain = local.time.total / spread.time.total - 1
    words = f"{gain:.0%} faster than" if gain > 0.005 else f"{-gain:.0%} slower than" if gain < -0.005 else "as fast as"
    return [
        f"Experts over ranks: the best layout with ({layout_words(spread)}) is {words} the best without "
        f"({layout_words(local) or 'one rank'})."
    ]


def _refused(refused: list[Candidate]) -> list[str]:
    """The layouts that come nearest to fitting, with what is too large."""
    if not refused:
        return []
    which = "these" if len(refused) <= REFUSED else f"the nearest {REFUSED}"
    lines = [f"{layout_words(candidate) or 'one rank'}: {candidate.refused}" for candidate in refused[:REFUSED]]
    return [f"{len(refused)} do not fit, {which} need:", *(f"  {line}" for line in lines)]


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
