"""How long an optimizer step takes: arithmetic, waiting for messages, idle time of a pipeline, update.

    step = (m + idle) x T + once,   T the time of a micro-batch on the slowest rank of the pipeline

T is the arithmetic of its layers at the rates that the device reaches, what elementwise operations move through memory,
the messages that it waits for, and what is left of those that run beside.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ...kernels import is_gated
from .activations import whole_layer
from .communication import Message, messages
from .devices import Device, Link, Rates
from .groups import span
from .job import Job
from .state import RankState

UPDATE_BYTES = 40.0  # a parameter: AdamW reads 16 and writes 12, clipping reads 8 and writes 4
ADD_BYTES = 12.0  # a gradient element that is added to that of the micro-batches before


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, of the slowest rank.

    Attributes:
        arithmetic: products of matrices, once again what is recomputed, elementwise operations and calls.
        messages: by kind, what the rank waits for.
        idle: of a pipeline.
        update: clipping and optimizer.
        tokens_per_second: of all ranks.
        mfu: model FLOPs utilisation, of the device's peak in the precision of the run.
    """

    arithmetic: float
    messages: dict[str, float]
    idle: float
    update: float
    tokens_per_second: float
    mfu: float

    @property
    def total(self) -> float:
        return self.arithmetic + sum(self.messages.values()) + self.idle + self.update

    def as_dict(self) -> dict[str, object]:
        return {"seconds": self.total, **asdict(self)}


def step_time(job: Job, device: Device) -> StepTime:
    """Of a job on so many of these devices."""
    ranks = [_rank_time(job, device, rank) for rank in range(job.layout.pp)]
    slowest = max(ranks, key=lambda rank: rank.per_micro_batch)
    micro_batches, idle_share = job.micro_batches, idle(job)
    waits = {kind: micro_batches * seconds for kind, seconds in slowest.waits.items()}
    for kind in {kind for rank in ranks for kind in rank.once}:
        waits[kind] = waits.get(kind, 0.0) + max(rank.once.get(kind, 0.0) for rank in ranks)
    arithmetic = micro_batches * slowest.arithmetic
    pause = idle_share * micro_batches * slowest.per_micro_batch
    update = max(rank.update for rank in ranks)
    seconds = arithmetic + sum(waits.values()) + pause + update
    tokens = job.tokens_per_step / seconds
    peak = device.peaks[job.workload.plan.trainer.precision] * job.layout.world
    return StepTime(arithmetic, waits, pause, update, tokens, tokens * job.workload.counts.flops_per_token / peak)


def idle(job: Job) -> float:
    """Idle time over work, of a schedule on an ideal machine with F = I = W (docs/pipeline.md)."""
    pp, schedule = job.layout.pp, job.workload.schedule
    if pp == 1:
        return 0.0
    share = (pp - 1) / job.micro_batches
    if schedule.name in ("gpipe", "1f1b"):
        return share
    return share / schedule.virtual / (3.0 if schedule.splits_backward else 1.0)


@dataclass(frozen=True)
class _RankTime:
    """Seconds of one pipeline rank: of a micro-batch, waits by kind, what it sends once a step, and its update."""

    arithmetic: float
    waits: dict[str, float]
    once: dict[str, float]
    update: float

    @property
    def per_micro_batch(self) -> float:
        return self.arithmetic + sum(self.waits.values())


def _rank_time(job: Job, device: Device, rank: int) -> _RankTime:
    state = RankState.of(job).whole(rank)
    arithmetic = arithmetic_seconds(job, device, rank)
    if job.micro_batches > 1:
        arithmetic += ADD_BYTES * state.accumulated / 4 / device.bandwidth
    arithmetic += 3.0 * state.cast / device.bandwidth
    waits: dict[str, float] = {}
    once: dict[str, float] = {}
    beside = {"step": 0.0, "backward": 0.0}
    for message in messages(job, rank):
        seconds = message_seconds(job, message, device)
        if message.hides:
            beside[message.hides] += seconds if message.hides == "backward" else seconds / job.micro_batches
        target, share = (once, 1.0) if message.once else (waits, 1.0 / job.micro_batches)
        target[message.kind] = target.get(message.kind, 0.0) + share * seconds
    _hide(waits, once, beside, device.overlap * arithmetic, job.micro_batches)
    update = device.step_seconds + UPDATE_BYTES * state.trained / 4 / device.bandwidth
    return _RankTime(arithmetic, waits, once, update)


def _hide(
    waits: dict[str, float], once: dict[str, float], beside: dict[str, float], room: float, micro_batches: int
) -> None:
    """Leave of messages that run beside computation what does not fit beside it: `room` seconds a micro-batch."""
    left = max(0.0, 1.0 - room / beside["step"]) if beside["step"] else 1.0
    for kind in ("fsdp gather", "fsdp scatter"):
        for found in (waits, once):
            if kind in found:
                found[kind] *= left
    if beside["backward"]:  # of the last micro-batch: two thirds of its time
        once["all-reduce"] *= max(0.0, 1.0 - room * 2 / 3 / beside["backward"])


def arithmetic_seconds(job: Job, device: Device, rank: int) -> float:
    """Forward and backward pass of one micro-batch through the layers of a rank, and the head where it has it."""
    rates = device.rates[job.workload.plan.trainer.precision]
    by_kind = job.layers_by_kind(rank).values()
    total = sum(len(layers) * _layer_seconds(job, device, rates, layers[0]) for layers in by_kind)
    if job.has_last(rank):
        config = job.workload.config
        total += device.scale["head"] * 3 * 2.0 * job.tokens * config.width * config.vocab_size / rates.head
    return total


def _layer_seconds(job: Job, device: Device, rates: Rates, layer: int) -> float:
    """Three times the forward products, four times where they are recomputed; elementwise operations; calls."""
    checkpointing = job.workload.plan.trainer.activation_checkpointing
    attention, half = forward_flops(job, layer)
    times = {"none": (3, 3), "selective": (3, 4), "full": (4, 4)}[checkpointing]
    seconds = sum(times[0] * flops / getattr(rates, part) for part, flops in attention.items())
    seconds += sum(times[1] * flops / getattr(rates, part) for part, flops in half.items())
    if job.workload.experts_recompute and "experts" in half:
        seconds += 2 / 3 * half["experts"] / rates.experts
    seconds += sum(times) / 6 * device.passes * elementwise_bytes(job, layer) / device.bandwidth
    kind = "moe" if job.workload.config.is_moe(layer) else "dense"
    seconds *= device.scale[kind]
    calls = device.layer_seconds[kind]
    return max(calls, seconds) if device.asynchronous else calls + seconds


def elementwise_bytes(job: Job, layer: int) -> float:
    """Activations of a layer, those inside of experts left out: the rate of experts is measured with them."""
    kept = whole_layer(job, layer).total
    if not job.workload.config.is_moe(layer):
        return kept
    z = 0 if job.workload.experts_recompute else 2 if is_gated(job.workload.expert_activation) else 1
    width = job.workload.config.expert_width or 0
    return kept - job.workload.element_bytes * job.assignments * z * width / job.layout.etp


def forward_flops(job: Job, layer: int) -> tuple[dict[str, float], dict[str, float]]:
    """Operations of a rank for one micro-batch, forward, by rate: of the attention half, and of the other half.

    Two for each weight and token that meet; of attention 4 H W C, C the mean number of tokens that a token sees.
    """
    config, tokens = job.workload.config, job.tokens
    length = job.sequence_length
    window = min(config.window_of(layer) or length, length)
    seen = (window * (window + 1) / 2 + (length - window) * window) / length
    heads = config.head_size * (config.heads + config.num_kv_heads)
    attention = {
        "dense": 2.0 * tokens * config.width * 2 * heads,
        "attention": 4.0 * tokens * config.heads * config.head_size * seen,
    }
    matrices = 3 if is_gated(config.activation) else 2
    if not config.is_moe(layer):
        return attention, {"dense": 2.0 * tokens * config.width * matrices * (config.ffn_width or 0)}
    of_expert = 3 if is_gated(job.workload.expert_activation) else 2
    expert = 2.0 * config.width * of_expert * (config.expert_width or 0) / job.layout.etp
    shared = 2.0 * config.width * matrices * (config.shared_expert_width or 0)
    router = 2.0 * config.width * config.num_experts
    return attention, {"dense": tokens * (shared + router), "experts": job.assignments * expert}


def message_seconds(job: Job, message: Message, device: Device) -> float:
    """Time of messages of a kind in a step: a ring as fast as its slowest link, an exchange both ways at once.

    Ranks of a group on one machine share its adapters with those of other groups, each has its own part.
    """
    where = span(job.layout, message.group, device.ranks_per_node)
    inside, network = device.inside[message.collective], device.network
    if not where.crosses:
        return message.count * inside.latency + message.bytes / inside.bandwidth
    if message.collective == "all_to_all":
        near = message.bytes * (1 - where.others) / inside.bandwidth
        return message.count * network.latency + max(near, message.bytes * where.others / network.bandwidth)
    together = 1 if message.collective == "send" else where.inside
    slowest = Link(min(inside.bandwidth, network.bandwidth * together), network.latency)
    return message.count * slowest.latency + message.bytes / slowest.bandwidth
