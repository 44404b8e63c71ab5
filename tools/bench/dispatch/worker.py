"""One rank of the measurement: `python -m scatterfold.tools.bench.dispatch.worker SETTINGS RESULT`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ....kernels import Routing, moe_mlp
from ....parallel.dispatchers import AllGatherDispatcher, AllToAllDispatcher, run_experts
from ....parallel.dispatchers.exchange import ExchangingDispatcher
from ....parallel.layout import Layout
from ....parallel.meshes import Meshes
from ....parallel.process import Process, running
from ..kernels.case import DTYPES
from ..kernels.clock import make_clock
from ..kernels.shapes import Shape
from ..traffic import Traffic
from .case import draw, remote_copies, remote_pairs

DISPATCHERS: dict[str, type[ExchangingDispatcher]] = {
    "all_to_all": AllToAllDispatcher,
    "all_gather": AllGatherDispatcher,
}


def main(settings: dict[str, Any], result: Path) -> None:
    """Measure all cases; rank 0 writes the records."""
    with running(settings["device"]) as process:
        layout = Layout(ep=process.world // settings["etp"], etp=settings["etp"]).resolve(process.world)
        meshes = layout.meshes(process.device.type)
        records = [
            _measure(process, meshes, Shape(**shape), routing, name, settings)
            for shape in settings["shapes"]
            for routing in settings["routings"]
            for name in settings["dispatchers"]
        ]
        if process.is_main:
            result.write_text(json.dumps(records))


def _measure(
    process: Process, meshes: Meshes, shape: Shape, routing: str, name: str, settings: dict[str, Any]
) -> dict[str, Any]:
    layout, dtype = meshes.layout, DTYPES[settings["dtype"]]
    own = meshes.coordinates
    dispatcher = DISPATCHERS[name](meshes, settings["capacity_factor"], settings["chunks"])
    dispatcher.check(shape.experts, shape.expert_width)
    experts = draw(routing, shape, layout.ep, settings["seed"], process.rank)
    x, grad, w_in, w_out, weights = _tensors(shape, layout.ep, layout.etp, dtype, process, settings["seed"])
    where = experts.to(process.device)
    dropped: list[Tensor] = []

    def forward() -> Tensor:
        dispatched = dispatcher.dispatch(x, Routing.from_topk(where, weights, shape.experts))
        if dispatched.dropped is not None:
            dropped[:] = [dispatched.dropped]
        return run_experts(dispatcher, dispatched, lambda rows, local: moe_mlp(rows, w_in, w_out, local))

    def both() -> Tensor:
        out = forward()
        out.backward(grad)
        return out.detach()

    with Traffic(meshes) as traffic, torch.no_grad():
        forward()
    with Traffic(meshes) as whole:
        both()
    rows_bytes = sum(
        sent.bytes
        for sent in traffic.sent
        if sent.shape is not None and sent.shape[1:] == (shape.width,) and sent.dtype == dtype
    )
    row_bytes = shape.width * dtype.itemsize
    spread = (shape.experts, layout.ep, layout.etp, own.ep)
    mine = {
        "rows_bytes": rows_bytes,
        "other_bytes": sum(sent.bytes for sent in traffic.sent) - rows_bytes,
        "training_bytes": sum(sent.bytes for sent in whole.sent),
        "messages": len(traffic.sent),
        "bound_bytes": 2 * remote_pairs(experts, *spread) * row_bytes,  # there, and a sum back
        "copies_bytes": 2 * remote_copies(experts, *spread) * row_bytes,
        "dropped": int(dropped[0]) if dropped else 0,
        "forward_ms": _time(process, settings["repeats"], lambda: _without_graph(forward)),
        "training_ms": _time(process, settings["repeats"], both),
    }
    found: list[dict[str, Any]] = [{}] * process.world
    dist.all_gather_object(found, mine)
    return {"shape": vars(shape), "routing": routing, "dispatcher": name, "ranks": found}


def _tensors(shape: Shape, ep: int, etp: int, dtype: torch.dtype, process: Process, seed: int) -> list[Tensor]:
    """Leaves x, w_in, w_out and combine weights of this rank, and the gradient of the output in second place."""
    generator = torch.Generator().manual_seed(seed * 1000 + 500 + process.rank)
    local, hidden = shape.experts // ep, shape.expert_width // etp

    def randn(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator).mul_(scale).to(process.device, dtype).requires_grad_()

    return [
        randn(shape.tokens, shape.width),
        randn(shape.tokens, shape.width).detach(),
        randn(local, 2 * hidden, shape.width, scale=shape.width**-0.5),
        randn(local, shape.width, hidden, scale=shape.expert_width**-0.5),
        randn(shape.tokens, shape.top_k, dtype=torch.float32),
    ]


@torch.no_grad()
def _without_graph(run: Callable[[], Tensor]) -> Tensor:
    return run()


def _time(process: Process, repeats: int, run: Callable[[], Tensor]) -> float:
    """Median milliseconds of this rank; all start together, after one call that warms up."""
    clock, times = make_clock(process.device), []
    run()
    for _ in range(repeats):
        dist.barrier()
        times.append(clock.time(run))
    return statistics.median(times)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
