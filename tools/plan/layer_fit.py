"""What a layer and a step of the engine take besides the arithmetic that was measured by itself."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ...moe.estimate import Device, Job, Workload
from ...moe.estimate.step_time import UPDATE_BYTES, arithmetic_seconds, elementwise_bytes
from ...moe.training.run_plan import RunPlan
from ...parallel.layout import ResolvedLayout
from ...parallel.meshes import ALONE
from ...parallel.process import Process, gather
from .measure import Steps

FEW, MANY = 1, 3  # layers of the models whose steps are timed: the difference is what two layers take
SHORT = 16  # tokens of a sequence in steps of which calls are the larger part
STEPS = 7


@dataclass(frozen=True)
class _Timed:
    """Steps of one layer kind and sequence length.

    Attributes:
        job: of one layer.
        step, layer: seconds of its step, and of each layer more.
    """

    job: Job
    step: float
    layer: float


def with_steps(config: dict[str, Any], job: Job, process: Process, device: Device) -> Device:
    """The device with `passes`, `layer_seconds` and `step_seconds`, from steps that each rank does for itself.

    A layer takes calls + passes x its bytes / bandwidth + known, where known are the arithmetic and the update of its
    parameters. Short and long sequences give two equations. Each kind of layer has its own calls; of passes the mean.
    """
    kinds: dict[str, dict[str, Any]] = {"moe": {}} if job.workload.plan.model.is_moe else {}
    if job.workload.config.ffn_width is not None:
        kinds["dense"] = {"num_experts": 0}
    lengths = SHORT, job.workload.plan.data.sequence_length
    timed = {
        kind: [_time(config, length, changes, job.share.micro_batch_size, process) for length in lengths]
        for kind, changes in kinds.items()
    }
    fitted = {kind: _fit(device, *pair) for kind, pair in timed.items()}
    calls = {kind: found[0] for kind, found in fitted.items()}
    device = replace(
        device,
        passes=statistics.mean(passes for _, passes in fitted.values()),
        layer_seconds={kind: calls.get(kind, max(calls.values())) for kind in ("dense", "moe")},
    )
    return replace(device, step_seconds=statistics.mean(_rest(device, short) for short, _ in timed.values()))


def _time(config: dict[str, Any], length: int, changes: dict[str, Any], sequences: int, process: Process) -> _Timed:
    seconds, jobs = [], []
    for layers in (FEW, MANY):
        plan = RunPlan.from_config(_changed(config, layers, length, changes, sequences))
        steps = Steps(plan, Process(device=process.device), ALONE)
        for _ in range(2):
            steps()
        seconds.append(max(gather(statistics.median(steps.seconds(STEPS)))))
        jobs.append(Job(Workload.of(plan, process.device.type), ResolvedLayout()))
    return _Timed(jobs[0], seconds[0], (seconds[1] - seconds[0]) / (MANY - FEW))


def _changed(
    config: dict[str, Any], layers: int, length: int, changes: dict[str, Any], sequences: int
) -> dict[str, Any]:
    model = {**config["model"], "layers": layers, "first_k_dense": 0, "moe_every": 1, "moe_layers": None, **changes}
    data = {**config["data"], "sequence_length": length, "global_batch_size": sequences, "micro_batch_size": None}
    trainer = {**config["trainer"], "activation_checkpointing": "none", "compile": False}
    return {**config, "model": model, "data": {**data, "pack_documents": False}, "trainer": trainer, "layout": {}}


def _fit(device: Device, short: _Timed, long: _Timed) -> tuple[float, float]:
    """Seconds of calls, and passes, of a layer; none of them below zero."""
    bare = replace(device, passes=0.0, layer_seconds={"dense": 0.0, "moe": 0.0}, asynchronous=False)
    left, moved = [], []
    for timed in (short, long):
        layer = timed.job.workload.inventory.kinds[0]
        update = UPDATE_BYTES * sum(prod(parameter.shape) for parameter in layer) / device.bandwidth
        known = arithmetic_seconds(timed.job, bare, 0) - _head_seconds(timed.job, bare)
        left.append(timed.layer - known - update)
        moved.append(elementwise_bytes(timed.job, 0) / device.bandwidth)
    passes = max((left[1] - left[0]) / (moved[1] - moved[0]), 0.0)
    return max(left[0] - passes * moved[0], 0.0), passes


def _rest(device: Device, timed: _Timed) -> float:
    """Seconds of a step besides its layer, its head and the update of its parameters."""
    update = UPDATE_BYTES * timed.job.workload.inventory.total / device.bandwidth
    return max(timed.step - arithmetic_seconds(timed.job, device, 0) - update, 0.0)


def _head_seconds(job: Job, device: Device) -> float:
    config = job.workload.config
    rate = device.rates[job.workload.plan.trainer.precision].head
    return 6.0 * job.tokens * config.width * config.vocab_size / rate
