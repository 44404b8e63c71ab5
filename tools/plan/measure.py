"""Steps of the real engine on made-up tokens: what they hold, send and take."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...moe.context import StepContext
from ...moe.data.batches import Share
from ...moe.training.run import prepare_engine
from ...moe.training.run_plan import RunPlan
from ...parallel.engines import Engine
from ...parallel.meshes import Meshes
from ...parallel.process import Process
from ...parallel.shards import local_part
from ..bench.kernels.memory import peak_bytes
from ..bench.traffic import Traffic

PEAK_STEPS = 3


class Steps:
    """The engine of a configuration in one layout, and a batch of random tokens that every layout shares."""

    def __init__(self, plan: RunPlan, process: Process, meshes: Meshes, seed: int = 0) -> None:
        self.plan, self.process, self.meshes = plan, process, meshes
        self.engine: Engine = prepare_engine(plan, process, meshes)
        self.batches = _micro_batches(plan, meshes, process.device, seed)
        self.scale = 1.0 / (plan.data.global_batch_size * plan.data.sequence_length)

    def __call__(self) -> Tensor:
        """One optimizer step: this rank's share of the loss."""
        share = self.engine.run(self.batches, self.scale)
        self.engine.clip(self.plan.trainer.gradient_clip)
        self.engine.step()
        self.engine.zero_grad()
        return share

    def seconds(self, count: int) -> list[float]:
        """Times of so many steps, of the slowest rank each."""
        times = torch.zeros(count, dtype=torch.float64)
        for step in range(count):
            self._meet()
            start = time.perf_counter()
            self()
            self._meet()
            times[step] = time.perf_counter() - start
        return times.tolist()

    def _meet(self) -> None:
        if self.process.device.type == "cuda":
            torch.cuda.synchronize(self.process.device)
        if self.process.world > 1:
            dist.barrier()

    def traffic(self) -> list[list[Any]]:
        """One step's messages: [purpose, collective, bytes sent, how many] of each kind."""
        with Traffic(self.meshes) as traffic:
            self()
        kinds: dict[tuple[str, str], list[int]] = {}
        for sent in traffic.sent:
            kinds.setdefault((sent.purpose, sent.collective), []).append(sent.bytes)
        return [[*kind, sum(sizes), len(sizes)] for kind, sizes in kinds.items()]

    def state_bytes(self) -> dict[str, int]:
        """What this rank holds between two steps, and the gradients that are there in between."""
        parameters = [p for part in self.engine.parts for p in part.parameters()]
        moments = [value for state in self.engine.optimizer.state.values() for value in state.values()]
        self.engine.run(self.batches, self.scale)
        gradients = [p.grad for p in parameters if p.grad is not None]
        counted = {"parameters": parameters, "gradients": gradients, "optimizer": moments}
        found = {name: sum(map(_bytes, tensors)) for name, tensors in counted.items()}
        self.engine.zero_grad()
        return found

    def peak_bytes(self) -> int:
        """The most that this rank holds during a step, as torch's allocator sees it: the least of three steps.

        A thread of gloo lets go of a message's buffer when it runs again, which on a busy machine may be many
        milliseconds after the call has returned. That only adds, and says nothing about the configuration.
        CUDA: torch.cuda.max_memory_allocated. CPU: parameters, optimizer state and DDP's buckets, counted, and what the
        profiler sees allocated and freed on top.
        """
        device = self.process.device
        gc.collect()
        growth = peak_bytes(self, device, PEAK_STEPS)
        if device.type == "cuda":
            return growth + torch.cuda.memory_allocated(device)
        held = self.state_bytes()
        layout = self.meshes.layout
        by_ddp = layout.dp_replicate == layout.world > 1 and layout.ep * layout.etp == 1
        buckets = held["gradients"] if by_ddp else 0
        return held["parameters"] + held["optimizer"] + buckets + growth


def _bytes(tensor: Any) -> int:
    if not isinstance(tensor, Tensor):
        return 0
    local = local_part(tensor.detach())
    return local.numel() * local.element_size()


def _micro_batches(plan: RunPlan, meshes: Meshes, device: torch.device, seed: int) -> list[dict[str, Any]]:
    data = plan.data
    generator = torch.Generator().manual_seed(seed)
    shape = data.global_batch_size, data.sequence_length + 1
    whole = torch.randint(0, plan.model.config.vocab_size, shape, generator=generator)
    own = whole.chunk(meshes.data_world)[meshes.data_rank].to(device)
    share = Share.of(data.global_batch_size, data.micro_batch_size, meshes.data_rank, meshes.data_world)
    context = StepContext(share.micro_batch_size, data.global_batch_size * data.sequence_length)
    return list(_parts(own, share.micro_batches, context))


def _parts(own: Tensor, count: int, context: StepContext) -> Iterator[dict[str, Any]]:
    for part in own.chunk(count):
        tokens, labels = part[:, :-1].contiguous(), part[:, 1:].contiguous()
        yield {"tokens": tokens, "labels": labels, "cu_seqlens": None, "context": context}
