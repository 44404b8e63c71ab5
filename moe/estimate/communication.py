"""What a rank sends in one optimizer step, message by message.

Bytes are those that a rank hands to others: (n - 1) / n of what is gathered or scattered over n ranks, 2 (n - 1) / n of
what is summed (a ring), of an exchange what is not for itself. Parts that only carry a few numbers are left out (loss,
gradient norm, counts of balance losses, sizes of a dispatch). Letters as in `activations`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .groups import span, stride_and_size
from .inventory import Held, held
from .job import Job
from .memory import in_flight
from .state import RankState

KINDS = ("fsdp gather", "fsdp scatter", "all-reduce", "tp", "cp", "dispatch", "combine", "pp")


@dataclass(frozen=True)
class Message:
    """One kind of message of a rank.

    Attributes:
        kind: one of KINDS.
        group: over which ranks, as in `ResolvedLayout.groups`.
        collective: all_gather, reduce_scatter, all_reduce, all_to_all or send.
        bytes, count: sent in a step, in so many messages.
        hides: what it can run beside: "step" (any computation: FSDP asks ahead), "backward" (the last backward pass:
            DDP), or "" where the rank waits.
        once: whether it is sent once a step, and not for every micro-batch.
    """

    kind: str
    group: str
    collective: str
    bytes: float
    count: float
    hides: str = ""
    once: bool = False


def messages(job: Job, rank: int = 0) -> list[Message]:
    """All messages of a rank of the pipeline in a step."""

    def make() -> list[Message]:
        found = [*_weights(job, rank), *_tensor_parallel(job, rank), *_layers(job, rank), *_pipeline(job, rank)]
        return [message for message in found if message.bytes > 0]

    return job.remember(("messages", rank), make)


def volume(job: Job, ranks_per_node: int) -> dict[str, dict[str, float]]:
    """By kind, bytes that a rank sends `inside` of its machine and `between` machines; mean over all ranks."""
    found = {kind: {"inside": 0.0, "between": 0.0} for kind in KINDS}
    for rank in range(job.layout.pp):
        for message in messages(job, rank):
            where = span(job.layout, message.group, ranks_per_node)
            share = {"all_to_all": where.others, "send": where.after}.get(message.collective, where.next)
            found[message.kind]["between"] += message.bytes * share / job.layout.pp
            found[message.kind]["inside"] += message.bytes * (1 - share) / job.layout.pp
    return found


def _weights(job: Job, rank: int) -> Iterator[Message]:
    """Parameters and gradients, parameter by parameter, put together by kind and group.

    FSDP gathers a layer (n - 1) / n x its bytes as often as `_gathers` counts, embedding, norm and head once a
    micro-batch (once a step in a pipeline), scatters gradients in float32, and sums them over copies. What it does not
    manage is summed over the ranks that have a part of it.
    """
    inventory, precision = job.workload.inventory, job.workload.plan.trainer.precision
    placed = RankState.of(job).placed
    ends = [*(inventory.first if job.has_first(rank) else ()), *(inventory.last if job.has_last(rank) else ())]
    totals: dict[tuple[str, str, str, bool], float] = {}
    units: dict[tuple[str, str, str, bool], float] = {}

    def add(items: list[Held], layers: int, gathers: float) -> None:
        seen = set()
        for item in items:
            for key, size, times in _of_parameter(job, item, gathers):
                totals[key] = totals.get(key, 0.0) + layers * times * size
                if key not in seen:
                    units[key] = units.get(key, 0.0) + layers * times
                    seen.add(key)

    for kind, layers in job.layers_by_kind(rank).items():
        add(placed[kind], len(layers), _gathers(job, rank))
    add([held(p, job.layout, precision) for p in ends], 1, 1.0 if job.layout.pp > 1 else float(job.micro_batches))
    for (kind, group, collective, once), size in totals.items():
        hides = "step" if kind.startswith("fsdp") else "backward" if job.by_ddp else ""
        count = units[kind, group, collective, once]
        if kind == "all-reduce":
            count = max(1.0, size / 2 / (job.workload.plan.engine.bucket_mb * 2**20))
        yield Message(kind, group, collective, size, count, hides, once)


def _of_parameter(job: Job, item: Held, gathers: float) -> Iterator[tuple[tuple[str, str, str, bool], float, float]]:
    """(kind, group, collective, once a step), bytes of one message, and how often."""
    travels = job.workload.element_bytes if item.parameter.in_unit else 4
    if item.by_fsdp:
        group = "edp_shard" if item.parameter.is_expert and job.layout.is_folded else "dp_cp"
        others = item.shards - 1
        yield ("fsdp gather", group, "all_gather", False), travels * item.stored * others, gathers
        if item.parameter.trained:
            often = job.micro_batches if job.workload.plan.engine.reduce_every_micro_batch else 1
            yield ("fsdp scatter", group, "reduce_scatter", often == 1), 4.0 * item.stored * others, often
    for group in item.sums if item.parameter.trained else ():
        size = stride_and_size(job.layout, group)[1]
        yield ("all-reduce", group, "all_reduce", True), 8.0 * item.stored * (size - 1) / size, 1


def _gathers(job: Job, rank: int) -> float:
    """How often FSDP gathers a layer in a step.

    Forward and backward of each micro-batch, or once where it stays gathered in between. A pipeline keeps weights after
    a backward pass until the next forward pass has used them, or for good with reshard_after_forward=false.
    """
    reshards, micro_batches = job.workload.plan.engine.reshard_after_forward, job.micro_batches
    if job.layout.pp == 1:
        return micro_batches * (2.0 if reshards else 1.0)
    if not reshards:
        return 1.0
    ahead = min(round(in_flight(job, rank)), micro_batches)
    order = "F" * ahead + "BF" * (micro_batches - ahead) + "B" * ahead
    gathered, count = False, 0
    for action in order:
        count += not gathered
        gathered = action == "B"
    return float(count)


def _tensor_parallel(job: Job, rank: int) -> Iterator[Message]:
    """Parts of a sequence gathered and scattered, w s D (TP - 1) each.

    Attention and a dense MLP or shared expert each gather and scatter once forward and once backward. Recomputation
    stops where everything that was saved is back: it gathers and scatters for attention, gathers for a dense MLP, and
    does both for a shared expert, which comes before the experts. The embedding scatters float32, the loss gathers.
    """
    layout, config, width = job.layout, job.workload.config, job.workload.element_bytes
    if layout.tp == 1:
        return
    checkpointing = job.workload.plan.trainer.activation_checkpointing
    hidden, others = width * job.tokens * config.width, layout.tp - 1
    passes = norms = 0.0
    for layer in job.layers(rank):
        is_moe = config.is_moe(layer)
        passes += 4 + (2 if checkpointing == "full" else 0)
        norms += 4 + (2 if checkpointing == "full" else 0)
        if not is_moe or config.shared_expert_width is not None:
            passes += 4 + ((2 if is_moe else 1) if checkpointing != "none" else 0)
    times = job.micro_batches
    yield Message("tp", "tp", "all_gather", times * passes * hidden * others, times * passes)
    if config.qk_norm == "projection":
        sums = 8.0 * job.cp_tokens * others / layout.tp
        yield Message("tp", "tp", "all_reduce", times * norms * sums, times * norms)
    if job.has_first(rank):
        size = 2 * 4.0 * job.tokens * config.width * others
        yield Message("tp", "tp", "reduce_scatter", times * size, 2 * times)
    if job.has_last(rank):
        size = (2 * hidden + 8.0 * job.cp_tokens) * others
        yield Message("tp", "tp", "all_gather", times * size, 3 * times)


def _layers(job: Job, rank: int) -> Iterator[Message]:
    """Keys and values of cp, and tokens to their experts and back, over all layers of a rank."""
    layers = job.layers(rank)
    checkpointing = job.workload.plan.trainer.activation_checkpointing
    for message in _context_parallel(job, again=checkpointing == "full"):
        yield _times(message, len(layers) * job.micro_batches)
    moe = sum(job.workload.config.is_moe(layer) for layer in layers)
    for message in _dispatch(job, again=checkpointing != "none"):
        yield _times(message, moe * job.micro_batches)


def _context_parallel(job: Job, again: bool) -> Iterator[Message]:
    """2 w n G W / TP (CP - 1) forward (once more if recomputed), and as many bytes of gradients backward."""
    config, layout = job.workload.config, job.layout
    keys = 2.0 * job.workload.element_bytes * job.cp_tokens * config.num_kv_heads * config.head_size / layout.tp
    yield Message("cp", "cp", "all_gather", (2 + again) * keys * (layout.cp - 1), 2 + again)


def _dispatch(job: Job, again: bool) -> Iterator[Message]:
    """Rows of a layer to other ranks and their sums back: w D for each remote row, and as much for gradients.

    Beside the rows, 8 bytes for each remote assignment forward, and 4 backward. A layer that is recomputed sends its
    rows again, but not its sums; of several chunks only those of the last are not sent.
    """
    ranks, width = job.dispatch_ranks, job.workload.element_bytes
    if ranks == 1:
        return
    row = width * job.workload.config.width
    if job.workload.sends_everything:
        rows = float(job.tokens * (ranks - 1))
    elif job.workload.capacity_factor is not None:
        rows = job.rows * (ranks - 1) / ranks
    else:
        rows = job.tokens * job.holders * (job.layout.etp - 1.0 / job.layout.ep)
    pairs = job.tokens * job.workload.experts_per_token * (job.layout.etp - 1.0 / job.layout.ep)
    if job.workload.capacity_factor is not None:
        pairs = job.assignments * (ranks - 1) / ranks
    tables = (12.0 + 8.0 * again) * pairs
    chunks = job.workload.chunks
    yield Message("dispatch", "dispatch", "all_to_all", (2 + again) * rows * row + tables, chunks * (6 + 4 * again))
    back = 2 + again * (chunks - 1) / chunks
    yield Message("combine", "dispatch", "all_to_all", back * rows * row, back * chunks)


def _pipeline(job: Job, rank: int) -> Iterator[Message]:
    """Hidden states to the rank of the next part and gradients to that of the one before: 4 s D a micro-batch each."""
    pp, schedule = job.layout.pp, job.workload.schedule
    hidden, stages = 4.0 * job.tokens * job.workload.config.width, schedule.stages(pp)
    neighbours = sum(
        schedule.rank_of(other, pp) != rank
        for stage in schedule.stages_of(rank, pp)
        for other in (stage - 1, stage + 1)
        if 0 <= other < stages
    )
    times = job.micro_batches * neighbours if pp > 1 else 0
    yield Message("pp", "pp", "send", times * hidden, times)


def _times(message: Message, times: int) -> Message:
    return replace(message, bytes=message.bytes * times, count=message.count * times)
