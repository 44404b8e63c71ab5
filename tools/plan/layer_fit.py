"""What a layer and a step of the engine take besides the arithmetic that was measured by itself."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ...moe.estimate import Device, Job, Workload
from ...moe.estimate.step_time import UPDATE_BYTES, arithmetic_seconds
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
    """The device with `scale`, `layer_seconds` and `step_seconds`, from steps that each rank does for itself.

    A layer takes calls + scale x the sum of its parts, besides the update of its parameters, and what is left of a step
    takes as much with its head. Short and long sequences give two equations each, so a step of the configuration that
    is measured is predicted as it was.
    """
    kinds: dict[str, dict[str, Any]] = {"moe": {}} if job.workload.plan.model.is_moe else {}
    if job.workload.config.ffn_width is not None:
        kinds["dense"] = {"num_experts": 0}
    lengths = SHORT, job.workload.plan.data.sequence_length
    bare = replace(device, passes=1.0, layer_seconds={"dense": 0.0, "moe": 0.0}, step_seconds=0.0, asynchronous=False)
    calls, scale, rests = {}, {}, []
    for kind, changes in kinds.items():
        pair = [_time(config, length, changes, job.share.micro_batch_size, process) for length in lengths]
        short, long = (_layer(bare, timed) for timed in pair)
        calls[kind], scale[kind] = _line(short, long, device.asynchronous)
        short, long = (_rest(bare, timed) for timed in pair)
        rests.append(_line(short, long, device.asynchronous))
    return replace(
        device,
        passes=1.0,
        layer_seconds={kind: calls.get(kind, max(calls.values())) for kind in ("dense", "moe")},
        step_seconds=statistics.mean(constant for constant, _ in rests),
        scale={kind: scale.get(kind, max(scale.values())) for kind in ("dense", "moe")}
        | {"head": statistics.mean(factor for _, factor in rests)},
    )


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


def _line(short: tuple[float, float], long: tuple[float, float], asynchronous: bool) -> tuple[float, float]:
    """Constant and factor of a line through two points (sum of the parts, seconds); none of them below zero.

    Where calls run ahead of the device, the short one shows what calls take, and the long one what the device does.
    """
    through_zero = max(long[1], 0.0) / long[0]
    if asynchronous:
        return max(short[1], 0.0), through_zero
    factor = (long[1] - short[1]) / (long[0] - short[0])
    constant = short[1] - factor * short[0]
    return (constant, factor) if factor > 0.0 and constant >= 0.0 else (0.0, through_zero)


def _layer(bare: Device, timed: _Timed) -> tuple[float, float]:
    """The sum of a layer's parts, and what it took besides the update of its parameters."""
    parts = arithmetic_seconds(timed.job, bare, 0) - _head_seconds(timed.job, bare)
    return parts, timed.layer - _update_seconds(timed.job, bare, _layer_parameters(timed.job))


def _rest(bare: Device, timed: _Timed) -> tuple[float, float]:
    """The head, and what a step took besides its layer and the update of its other parameters."""
    others = timed.job.workload.inventory.total - _layer_parameters(timed.job)
    return _head_seconds(timed.job, bare), timed.step - timed.layer - _update_seconds(timed.job, bare, others)


def _layer_parameters(job: Job) -> int:
    return sum(prod(parameter.shape) for parameter in job.workload.inventory.kinds[0])


def _update_seconds(job: Job, device: Device, parameters: int) -> float:
    return UPDATE_BYTES * parameters / device.bandwidth


def _head_seconds(job: Job, device: Device) -> float:
    config = job.workload.config
    rate = device.rates[job.workload.plan.trainer.precision].head
    return 6.0 * job.tokens * config.width * config.vocab_size / rate
