"""How fast ranks exchange messages: latency of a small one, bandwidth of a large one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from ...moe.estimate.devices import COLLECTIVES, Link
from ...parallel.torch_private import all_gather_single, reduce_scatter_single
from .rates import Clock

SMALL = 2**10  # elements of float32 that a rank hands over


def measure_links(clock: Clock) -> dict[str, Link]:
    """Of all ranks at once, by collective."""
    large = 2**24 if clock.device.type == "cuda" else 2**20
    found = {}
    for name in COLLECTIVES:
        latency = clock(_call(name, SMALL, clock.device))
        seconds = max(clock(_call(name, large, clock.device)) - latency, 1e-9)
        found[name] = Link(sent_bytes(name, large) / seconds, latency)
    return found


def sent_bytes(name: str, size: int) -> float:
    """What a rank sends, as `moe.estimate.communication` counts, of a tensor of so many elements of float32."""
    ranks = dist.get_world_size()
    others = ranks - 1
    shares = {"all_gather": others, "reduce_scatter": others / ranks, "all_reduce": 2 * others / ranks}
    return 4.0 * size * (shares | {"all_to_all": others / ranks, "send": 1})[name]


def _call(name: str, size: int, device: torch.device) -> Callable[[], object]:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    size = -(-size // ranks) * ranks
    handed = torch.ones(size, device=device)
    if name == "all_gather":
        gathered = torch.empty(ranks * size, device=device)
        return lambda: all_gather_single(gathered, handed)
    if name == "reduce_scatter":
        part = torch.empty(size // ranks, device=device)
        return lambda: reduce_scatter_single(part, handed)
    received = torch.empty_like(handed)
    if name == "all_to_all":
        return lambda: dist.all_to_all_single(received, handed)
    if name == "all_reduce":
        return lambda: dist.all_reduce(received)

    def send() -> None:
        """To the next rank and from the one before."""
        operations = [
            dist.P2POp(dist.isend, handed, (rank + 1) % ranks),
            dist.P2POp(dist.irecv, received, (rank - 1) % ranks),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return send
