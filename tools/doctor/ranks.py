"""Whether the ranks of a run understand each other: collectives with known results, how fast they are, who is slow.

Every rank runs `check_ranks` at the same time; each gets the whole result.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel.process import Process, gather

MANY_BYTES = 16 * 2**20
LINK_BYTES = 4 * 2**20
SIZES = (1, 1000, 100_003)  # elements a rank sends to each
REPEATS = 10
SLOW = 1.5  # times the median of all ranks
CLOCK_S = 0.1  # logs of ranks whose clocks differ more cannot be laid side by side


def check_ranks(process: Process) -> dict[str, Any]:
    """Compare all-reduce and all-to-all with what must come out, measure them, and find the slowest rank and link.

    Returns: `world`, `device`, `hosts` by rank; `wrong`, a line for each wrong result; `all_reduce` and `all_to_all`
        with `latency_us` (one number a rank) and `gb_per_s` (bytes that a rank holds over time); `links` from each
        rank to the next; `compute_ms` by rank, of one matrix product; `clock_offset_ms` by rank, against rank 0;
        `slow`, a line for each rank or link that is much slower than the others; `slowest_rank`.
    """
    wrong = [line for lines in gather(_wrong_results(process)) for line in lines]
    small = torch.zeros(process.world, device=process.device)
    many = torch.zeros(MANY_BYTES // 4 // process.world * process.world, device=process.device)
    result: dict[str, Any] = {
        "world": process.world,
        "device": process.device.type,
        "hosts": gather(socket.gethostname()),
        "wrong": wrong,
    }
    for name, collective in (("all_reduce", _all_reduce), ("all_to_all", _all_to_all)):
        latency = _slowest(_median_time(lambda: collective(small), process))  # noqa: B023
        seconds = _slowest(_median_time(lambda: collective(many), process))  # noqa: B023
        result[name] = {"latency_us": latency * 1e6, "gb_per_s": many.numel() * 4 / seconds / 1e9}
    result["links"] = _links(process)
    result["compute_ms"] = [seconds * 1e3 for seconds in gather(_compute_time(process))]
    result["clock_offset_ms"] = [seconds * 1e3 for seconds in gather(_clock_offset(process))]
    result["slowest_rank"] = max(range(process.world), key=lambda rank: result["compute_ms"][rank])
    return result | {"slow": _slow(result)}


def _all_reduce(tensor: Tensor) -> Tensor:
    out = tensor.clone()
    dist.all_reduce(out)
    return out


def _all_to_all(tensor: Tensor) -> Tensor:
    out = torch.empty_like(tensor)
    dist.all_to_all_single(out, tensor)
    return out


def _wrong_results(process: Process) -> list[str]:
    """What this rank gets that is not what it must get; whole numbers, so exactly."""
    rank, world, found = process.rank, process.world, []
    for size in SIZES:
        index = torch.arange(1, size + 1, device=process.device, dtype=torch.float64)
        total = world * (world + 1) // 2
        if not torch.equal(_all_reduce((rank + 1) * index), total * index):
            found.append(f"rank {rank}: all-reduce of {size} numbers")
        sent = torch.cat([1000 * rank + to + index for to in range(world)])
        due = torch.cat([1000 * source + rank + index for source in range(world)])
        if not torch.equal(_all_to_all(sent), due):
            found.append(f"rank {rank}: all-to-all of {world} x {size} numbers")
    return found


def _median_time(action: Callable[[], object], process: Process, repeats: int = REPEATS) -> float:
    action()
    times = []
    for _ in range(repeats):
        _wait(process)
        start = time.perf_counter()
        action()
        _wait(process)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(process: Process) -> None:
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)


def _slowest(seconds: float) -> float:
    """A collective is as slow as its slowest rank."""
    return max(gather(seconds))


def _links(process: Process) -> list[dict[str, Any]]:
    """From each rank to the next and back, one link after the other: `from`, `to`, `gb_per_s` in one direction."""
    tensor = torch.zeros(LINK_BYTES // 4, device=process.device)
    links = []
    for source in range(process.world if process.world > 2 else process.world - 1):
        target = (source + 1) % process.world
        seconds = 0.0

        def there_and_back(source: int = source, target: int = target) -> None:
            for first, second in ((source, target), (target, source)):
                if process.rank == first:
                    dist.send(tensor, second)
                else:
                    dist.recv(tensor, first)

        if process.rank in (source, target):
            seconds = _median_time(there_and_back, process, repeats=3) / 2
        seconds = gather(seconds)[source]
        links.append({"from": source, "to": target, "gb_per_s": LINK_BYTES / seconds / 1e9})
    return links


def _compute_time(process: Process) -> float:
    width = 4096 if process.device.type == "cuda" else 384
    matrix = torch.ones(width, width, device=process.device)
    return _median_time(lambda: matrix @ matrix, process)


def _clock_offset(process: Process) -> float:
    """How much later this rank's clock is than that of rank 0, by the question that was answered fastest."""
    best = (float("inf"), 0.0)
    box = torch.zeros(1, dtype=torch.float64)
    for rank in range(1, process.world):
        for _ in range(REPEATS):
            if process.rank == rank:
                asked = time.time()
                dist.send(box, 0)
                dist.recv(box, 0)
                answered = time.time()
                best = min(best, (answered - asked, (asked + answered) / 2 - float(box)))
            elif process.rank == 0:
                dist.recv(box, rank)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), rank)
    return best[1]


def _slow(result: dict[str, Any]) -> list[str]:
    """Ranks and links that hold the others up."""
    hosts, lines = result["hosts"], []
    middle = statistics.median(result["compute_ms"])
    for rank, took in enumerate(result["compute_ms"]):
        if took > SLOW * middle:
            lines.append(f"rank {rank} on {hosts[rank]} computes {took / middle:.1f} times as long as the median rank")
    speeds = [link["gb_per_s"] for link in result["links"]]
    for link in result["links"] if len(speeds) > 2 else []:
        if link["gb_per_s"] * SLOW < statistics.median(speeds):
            lines.append(
                f"rank {link['from']} to {link['to']} ({hosts[link['from']]} to {hosts[link['to']]}) carries "
                f"{link['gb_per_s']:.2f} GB/s, the median link {statistics.median(speeds):.2f}"
            )
    for rank, offset in enumerate(result["clock_offset_ms"]):
        if abs(offset) > CLOCK_S * 1e3:
            lines.append(f"the clock of rank {rank} on {hosts[rank]} is {offset:+.0f} ms off that of rank 0")
    return lines
