"""The most that a rank holds at once in a training step, by what it is for.

A step is walked through moment by moment: the end of a forward pass with the loss, the backward pass of each layer, and
the update of the weights. What is there at each moment is added up, and the moment with the most counts. Allocated
bytes are estimated: what a CUDA context, communicators and fragmentation need comes on top (`Device.reserved`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from math import ceil

from ...kernels.cross_entropy import CHUNK_ELEMENTS
from .activations import Kept, backward_buffers, dispatch_buffers, kept_by_layer, recomputed_by_layer
from .job import Job
from .state import RankState, State


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at one moment.

    Attributes:
        parameters, gradients, optimizer: the state of training.
        activations: what waits for the backward pass, or was just computed again for it.
        dispatch: rows that came from other ranks, the tables of their way, and buffers of those on their way.
        weights: gathered by FSDP, or cast by autocast, and the buffers to reduce their gradients.
        loss: logits of a chunk of tokens, and gradients of the head and of the last hidden state.
        temporary: gradients of activations, and of weights before they are added to others.
        moment: which.
        rank: of the pipeline, the one with the most.
    """

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    dispatch: float = 0.0
    weights: float = 0.0
    loss: float = 0.0
    temporary: float = 0.0
    moment: str = ""
    rank: int = 0

    @property
    def total(self) -> float:
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in PARTS}


PARTS = tuple(item.name for item in fields(Memory) if item.name not in ("moment", "rank"))


def peak_memory(job: Job) -> Memory:
    """Of the rank that holds the most."""
    state = RankState.of(job)
    moments = (moment for rank in range(job.layout.pp) for moment in _Walk(job, state, rank).moments())
    return max(moments, key=lambda memory: memory.total)


def in_flight(job: Job, rank: int) -> float:
    """Micro-batches whose activations of all its layers a pipeline rank holds at once (docs/pipeline.md)."""
    pp, micro_batches, schedule = job.layout.pp, job.micro_batches, job.workload.schedule
    if pp == 1:
        return 1.0
    if schedule.name == "gpipe":
        return float(micro_batches)
    if schedule.name == "1f1b":
        return float(min(pp - rank, micro_batches))
    if schedule.name == "interleaved":
        parts = 2 * (pp - rank - 1) + (schedule.virtual - 1) * pp + 1
        return min(parts / schedule.virtual, micro_batches)
    return float(min(pp, micro_batches))


class _Walk:
    """One pipeline rank through the last micro-batch of a step, when the gradients of the others are there."""

    def __init__(self, job: Job, state: RankState, rank: int) -> None:
        self.job, self.rank, self.kinds = job, rank, state.kinds
        self.layers = job.layers(rank)
        self.has_head = job.has_last(rank)
        self.ends, self.whole = state.ends(rank), state.whole(rank)
        self.flight = in_flight(job, rank)
        trainer = job.workload.plan.trainer
        engine = job.workload.plan.engine
        self.adds = job.micro_batches > 1 or job.layout.pp > 1
        self.adds_whole = self.adds and not engine.reduce_every_micro_batch
        self.checkpoints = trainer.activation_checkpointing != "none"
        self.offloads = trainer.activation_offload and job.workload.device_type == "cuda"
        self.by_kind = {kind: _Layer.of(job, kind) for kind in job.layers_by_kind(rank)}
        states = [self._state(index) for index in range(len(self.layers))]
        kept = [self._layer(index).kept for index in range(len(self.layers))]
        # Sums over the first i layers, for every i.
        self.activations = _sums(layer.activations for layer in kept)
        self.dispatch = _sums(layer.dispatch for layer in kept)
        self.gathered, self.cast = _sums(s.gathered for s in states), _sums(s.cast for s in states)
        self.gradients = _sums(s.gradients for s in states)

    def moments(self) -> Iterator[Memory]:
        yield self._memory(
            "loss" if self.has_head else "forward", len(self.layers), self._loss(), self._forward_weights
        )
        if self.has_head:
            yield self._memory("head", len(self.layers), 2.0 * self._head_gradients, self._backward_weights(None), 0.0)
        for index in self._corners():
            yield self._backward(index)
            yield self._reduce(index)
        first = self._state(0).sent if self.layers else 0.0
        yield self._memory("backward of the embedding", 0, 0.0, self.ends.gathered + first, self.ends.largest)
        yield self._memory("reduction", 0, 0.0, self.ends.sent, 0.0 if self.adds_whole else self.ends.fresh)
        gradients, bucket = self._ddp or self.whole.gradients, self.job.workload.plan.engine.bucket_mb * 2**20
        message = min(self.whole.summed, max(bucket, self.whole.longest))
        yield Memory(**self._fixed, gradients=gradients, temporary=message, moment="update", rank=self.rank)

    def _corners(self) -> Iterator[int]:
        """Layers at and beside the ends of each run of layers of one kind: in between everything grows evenly."""
        kinds = [self.job.kind(layer) for layer in self.layers]
        for index in range(len(kinds) - 1, -1, -1):
            near = kinds[max(index - 2, 0) : index + 3]
            if len(near) < 5 or len(set(near)) > 1:
                yield index

    def _backward(self, index: int) -> Memory:
        """When the gradient of the largest weights is there, and the activations that it came from still are."""
        layer = self._layer(index)
        again = layer.again if self.checkpoints else Kept()
        buffers = layer.buffers + self._state(index).largest
        memory = self._memory(
            f"backward of layer {self.layers[index]}", index + 1, 0.0, self._backward_weights(index), buffers
        )
        return _plus(memory, activations=again.activations, dispatch=again.dispatch + dispatch_buffers(self.job))

    def _reduce(self, index: int) -> Memory:
        """When FSDP has freed the weights of a layer, and copied its gradients for the message that reduces them."""
        fresh = 0.0 if self.adds_whole else self._state(index).fresh
        weights = self._backward_weights(index - 1) if index else self.ends.gathered + self._state(0).sent
        return self._memory(f"reduction of layer {self.layers[index]}", index, 0.0, weights, fresh)

    def _memory(self, moment: str, layers: int, loss: float, weights: float, temporary: float = 0.0) -> Memory:
        """With the activations of the first `layers` layers, and gradients of the others."""
        kept = self._activations(layers)
        return Memory(
            **self._fixed,
            gradients=self._gradients(layers),
            activations=kept.activations + self._tables + self._ends_kept(layers),
            dispatch=kept.dispatch,
            weights=weights,
            loss=loss + (self._head_gradients * (self.flight - 1) if self.has_head else 0.0),
            temporary=temporary,
            moment=moment,
            rank=self.rank,
        )

    @property
    def _fixed(self) -> dict[str, float]:
        return {"parameters": self.whole.parameters, "optimizer": self.whole.optimizer}

    @property
    def _ddp(self) -> float:
        """DDP's buckets, which stay from step to step. Those of earlier micro-batches are apart until it reduces."""
        return self.whole.gradients if self.job.by_ddp else 0.0

    def _gradients(self, layers: int) -> float:
        """While the backward pass has not reached the first `layers` layers."""
        if self._ddp:
            waiting = self.ends.gradients + self.gradients[layers] if self.adds else 0.0
            return self._ddp + waiting
        if self.adds:
            return self.whole.accumulated + (0.0 if self.adds_whole or not self.ends.fresh else self._head_weight)
        done = self.gradients[-1] - self.gradients[layers]
        return done + (self._head_weight if layers < len(self.layers) else 0.0)

    def _activations(self, layers: int) -> Kept:
        """Of this micro-batch the first `layers` layers, of others in flight all. What is offloaded is on the host."""
        current = Kept(self.activations[layers], self.dispatch[layers])
        if self.offloads:
            largest = max((layer.kept for layer in self.by_kind.values()), key=lambda kept: kept.total)
            return min(current, largest * 2.0, key=lambda kept: kept.total)
        return current + Kept(self.activations[-1], self.dispatch[-1]) * (self.flight - 1)

    def _ends_kept(self, layers: int) -> float:
        """Input of the final norm; in a pipeline, what was handed to the next stage: 4 s D each."""
        hidden = 4.0 * self.job.tokens * self.job.workload.config.width
        if self.has_head:
            return hidden * (self.flight if layers == len(self.layers) else self.flight - 1)
        return hidden * self.flight

    @property
    def _tables(self) -> float:
        """Rotary angles, 8 bytes a position and channel; token ids and labels of all micro-batches, and a mask."""
        config, data = self.job.workload.config, self.job.workload.plan.data
        return 8.0 * config.max_positions * config.head_size + 16.0 * self.job.share.per_rank * data.sequence_length

    @property
    def _head_weight(self) -> float:
        """V' D in float32, V' = V / TP rounded up: the gradient of the head."""
        if not self.has_head or not self.ends.trained:
            return 0.0
        return 4.0 * ceil(self.job.workload.config.vocab_size / self.job.layout.tp) * self.job.workload.config.width

    @property
    def _head_gradients(self) -> float:
        """Saved by the loss of a micro-batch for its backward pass: of the head, and of the hidden states w n D."""
        hidden = self.job.workload.element_bytes * self.job.cp_tokens * self.job.workload.config.width
        return self._head_weight + hidden

    def _loss(self) -> float:
        """`kernels.cross_entropy`: c logits at a time, twice in float32 while their log-sum-exp is taken, 8 c.

        Besides the gradients, the hidden states that the loss reads, w n D, gathered over tp and before, and under
        bf16 the head in bfloat16.
        """
        if not self.has_head:
            return 0.0
        config, width = self.job.workload.config, self.job.workload.element_bytes
        vocabulary = ceil(config.vocab_size / self.job.layout.tp)
        rows = min(self.job.cp_tokens, max(1, CHUNK_ELEMENTS // vocabulary))
        hidden = width * self.job.cp_tokens * config.width + width * self.job.tokens * config.width
        cast = 2.0 * vocabulary * config.width if width == 2 else 0.0
        return 8.0 * rows * vocabulary + hidden + cast + self._head_gradients

    @property
    def _forward_weights(self) -> float:
        """At the end of a forward pass: of FSDP what is not freed, of autocast what the graph or its cache keeps."""
        stay = self.whole.gathered if not self._reshards else self.ends.gathered
        return stay + (self.whole.cached if self.checkpoints else self.whole.cast)

    def _backward_weights(self, index: int | None) -> float:
        """At the backward pass of a layer (None: of the head): those gathered, and casts that the graph still keeps.

        FSDP gathers the next layer meanwhile, and keeps the message of the one before until its own is ready. A
        pipeline frees gathered weights after the last micro-batch only, so those of later layers are there, too.
        """
        count, weights = len(self.layers), self.ends.gathered
        at = count if index is None else index
        here = min(at + 1, count)
        if self.adds and not self.adds_whole and at + 1 >= count:
            weights += self.ends.sent  # the last message of the micro-batch before is kept until the next is ready
        weights += self.gathered[here] - (self.gathered[max(at - 1, 0)] if self._reshards else 0.0)
        if at + 1 < count:
            weights += self._state(at + 1).sent
        if at < count and self.job.layout.pp > 1:
            weights += self.gathered[-1] - self.gathered[here]
        if self.checkpoints:
            return weights + (self._state(at).cast if at < count else 0.0)
        return weights + self.cast[here]

    @property
    def _reshards(self) -> bool:
        return self.job.workload.plan.engine.reshard_after_forward

    def _state(self, index: int) -> State:
        return self.kinds[self.job.kind(self.layers[index])]

    def _layer(self, index: int) -> _Layer:
        return self.by_kind[self.job.kind(self.layers[index])]


class _Layer:
    """Bytes of one layer of a kind: kept, computed again, and held for a moment of its backward pass."""

    @classmethod
    def of(cls, job: Job, kind: int) -> _Layer:
        return job.remember((cls, kind), lambda: cls(job, kind))

    def __init__(self, job: Job, kind: int) -> None:
        layer = job.workload.inventory.layers.index(kind)
        self.kept, self.again = kept_by_layer(job, layer), recomputed_by_layer(job, layer)
        self.buffers = backward_buffers(job, layer)


def _sums(values: Iterable[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))


def _plus(memory: Memory, **more: float) -> Memory:
    return replace(memory, **{name: getattr(memory, name) + count for name, count in more.items()})
