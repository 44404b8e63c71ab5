"""One rank of the measurement: `python -m scatterfold.tools.bench.scaling.worker SETTINGS RESULT`."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ....moe.build import ModelPlan
from ....moe.context import StepContext
from ....moe.sharding import sharding_plan
from ....moe.training import AdamW
from ....parallel.engines import Engine, TorchEngine
from ....parallel.meshes import Meshes
from ....parallel.process import Process, running
from ....parallel.shards import local_part
from ..traffic import Sent, Traffic
from .case import Model, read_layout

_WARM_UP = 2


def main(settings: dict[str, Any], result: Path) -> None:
    """Measure one layout; rank 0 writes what all ranks found."""
    with running(settings["device"]) as process:
        meshes = read_layout(settings["layout"]).resolve(process.world).meshes(process.device.type)
        found = _measure(Model(**settings["model"]), meshes, process, settings)
        everyone: list[dict[str, Any]] = [found]
        if process.world > 1:
            everyone = [{}] * process.world
            dist.all_gather_object(everyone, found)
        if process.is_main:
            result.write_text(json.dumps(everyone))


def _measure(model: Model, meshes: Meshes, process: Process, settings: dict[str, Any]) -> dict[str, Any]:
    before = _peak_memory(process.device)
    engine = _engine(model, meshes, process, settings["precision"])
    batches = _micro_batches(model, meshes, process.device, settings["seed"])
    scale = 1.0 / (model.sequences * model.length)
    times, losses = [], []
    for step in range(_WARM_UP + settings["steps"]):
        if process.world > 1:
            dist.barrier()
        _synchronise(process.device)
        start = time.perf_counter()
        if step == _WARM_UP - 1:  # not a timed one: counting takes time
            with Traffic(meshes) as traffic:
                losses.append(_step(engine, batches, scale))
        else:
            losses.append(_step(engine, batches, scale))
        _synchronise(process.device)
        times.append(1e3 * (time.perf_counter() - start))
    loss = torch.tensor(losses[-1], dtype=torch.float64, device=process.device)
    if process.world > 1:
        dist.all_reduce(loss)
    return {
        "loss": loss.item(),
        "step_ms": statistics.median(times[_WARM_UP:]),
        "state_bytes": _state_bytes(engine),
        "peak_bytes": _peak_memory(process.device) - before,
        "sent": _by_kind(traffic.sent),
    }


def _by_kind(messages: list[Sent]) -> list[list[Any]]:
    """[purpose, collective, bytes, messages] of each kind."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for sent in messages:
        kinds.setdefault((sent.purpose, sent.collective), []).append(sent.bytes)
    return [[*kind, sum(sizes), len(sizes)] for kind, sizes in kinds.items()]


def _step(engine: Engine, batches: list[dict[str, Any]], scale: float) -> float:
    share = engine.run(batches, scale)
    engine.clip(1.0)
    engine.step()
    engine.zero_grad()
    return float(share)


def _engine(model: Model, meshes: Meshes, process: Process, precision: str) -> Engine:
    config = {
        "model": {
            "layers": model.layers,
            "width": model.width,
            "heads": model.heads,
            "expert_width": model.expert_width,
            "num_experts": model.experts,
            "vocab_size": model.vocabulary,
            "max_positions": model.length,
        },
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": model.top_k},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
    }
    plan, torch_engine = ModelPlan.from_config(config), TorchEngine()
    with torch.device("meta"):
        parts = plan.make_parts(torch_engine.schedule, meshes=meshes, sequence_length=model.length)
    return torch_engine.prepare(
        parts, AdamW(lr=1e-3), process=process, meshes=meshes, plan=sharding_plan(parts), precision=precision
    )


def _micro_batches(model: Model, meshes: Meshes, device: torch.device, seed: int) -> list[dict[str, Any]]:
    """This rank's share of a batch of random tokens, which is the same for every layout."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(0, model.vocabulary, (model.sequences, model.length + 1), generator=generator)
    own = whole.chunk(meshes.data_world)[meshes.data_rank].to(device)
    context = StepContext(
        num_sequences=own.shape[0] // model.micro_batches, global_tokens=whole.shape[0] * model.length
    )
    return [
        {
            "tokens": part[:, :-1].contiguous(),
            "labels": part[:, 1:].contiguous(),
            "cu_seqlens": None,
            "context": context,
        }
        for part in own.chunk(model.micro_batches)
    ]


def _state_bytes(engine: Engine) -> int:
    """Parameters and what the optimizer remembers of them, and as many bytes again for gradients."""
    parameters = [parameter for part in engine.parts for parameter in part.parameters()]
    state = [value for of_one in engine.optimizer.state.values() for value in of_one.values()]
    held = [local_part(tensor) for tensor in (*parameters, *parameters, *state) if isinstance(tensor, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
