"""Tile configurations: shipped defaults, tuning on request, and a cache on disk.

A choice is keyed by kernel, dtype, widths and a *bucket* of rows per expert (a power of two), never by the number of
rows itself, so a changing batch does not tune again. Nothing is tuned unless SCATTERFOLD_AUTOTUNE=1; what was tuned
once on a device is read from disk ever after. Every configuration here is compiled ahead of time for sm_90 by the
tests: it uses wgmma in half precision, spills no register and fits the shared memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton

from ..cache_folder import cache_folder


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel. `block_n` counts output features, of which a gated `up` has two.

    `parts`: the epilogue works on so many column parts one after the other (1, 2, 4), to need fewer registers.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 8
    stages: int = 3
    parts: int = 1
    group_m: int = 8
    tma: bool = True
    persistent: bool = False


@dataclass(frozen=True)
class Problem:
    """What a choice of configuration depends on. For weight gradients, outputs x contracted is an expert's matrix."""

    kernel: str  # up, rows, rows_k (weights stored contracted side first), dact, weight_grad
    dtype: torch.dtype
    rows: int
    experts: int
    outputs: int
    contracted: int
    halves: int = 1

    @property
    def bucket(self) -> int:
        """Rows per expert, rounded up to a power of two in [16, 8192]."""
        mean = -(-self.rows // self.experts)
        return min(8192, max(16, 1 << (mean - 1).bit_length()))

    def key(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel}/{dtype}/{self.halves}x{self.outputs}x{self.contracted}/rows{self.bucket}"


# Per kernel: from few to many rows per expert, (largest bucket, the default and its alternatives).
# "dact" and a gated "up" hold large accumulators when their epilogue begins: hence its parts. A gathered weight
# gradient spends a pipeline stage on the index for each on the rows: hence its stages.
_HALF: dict[str, list[tuple[int, list[Config]]]] = {
    "up": [
        (16, [Config(16, 32, 128, 4, 4), Config(16, 64, 64, 4, 4), Config(16, 32, 64, 4, 5)]),
        (64, [Config(64, 64, 64, 4, 4), Config(64, 128, 64, 8, 3), Config(64, 32, 64, 4, 4)]),
        (
            8192,
            [
                Config(128, 128, 64, 8, 3, parts=4),
                Config(128, 128, 64, 8, 4, parts=4),
                Config(128, 64, 64, 8, 4, parts=2),
                Config(64, 64, 64, 4, 4),
            ],
        ),
    ],
    "rows": [
        (16, [Config(16, 64, 128, 4, 4), Config(16, 128, 64, 4, 4), Config(16, 32, 128, 4, 4)]),
        (64, [Config(64, 128, 64, 4, 4), Config(64, 256, 64, 8, 3), Config(64, 64, 64, 4, 4)]),
        (
            8192,
            [
                Config(128, 256, 64, 8, 3),
                Config(128, 256, 64, 8, 4),
                Config(128, 128, 64, 8, 4),
                Config(64, 128, 64, 4, 4),
            ],
        ),
    ],
    "dact": [
        (16, [Config(16, 64, 64, 4, 4), Config(16, 32, 128, 4, 4)]),
        (64, [Config(64, 64, 64, 4, 4, parts=2), Config(64, 128, 64, 8, 3, parts=2)]),
        (
            8192,
            [
                Config(128, 128, 64, 8, 4, parts=4),
                Config(128, 128, 64, 8, 3, parts=4),
                Config(128, 64, 64, 8, 4, parts=2),
                Config(64, 128, 64, 8, 4, parts=2),
            ],
        ),
    ],
    "weight_grad": [
        (64, [Config(128, 128, 32, 8, 5), Config(64, 128, 32, 4, 5)]),
        (
            8192,
            [
                Config(128, 256, 64, 8, 5),
                Config(128, 256, 64, 8, 7),
                Config(256, 128, 64, 8, 5),
                Config(128, 128, 64, 8, 7),
            ],
        ),
    ],
}
_HALF["rows_k"] = _HALF["rows"]

# Exact float32 runs on the ordinary cores, whose operands sit in registers: small tiles, many warps.
_FULL: dict[str, list[tuple[int, list[Config]]]] = {
    "up": [(16, [Config(16, 32, 32, 4, 3)]), (8192, [Config(64, 64, 16, 8, 4), Config(64, 32, 16, 8, 3)])],
    "rows": [
        (16, [Config(16, 64, 32, 4, 3, tma=False)]),
        (8192, [Config(64, 64, 16, 8, 3, tma=False), Config(64, 64, 32, 8, 3)]),
    ],
    "dact": [(16, [Config(16, 32, 32, 4, 3)]), (8192, [Config(64, 64, 16, 8, 3), Config(64, 32, 16, 4, 4)])],
    "weight_grad": [(8192, [Config(64, 64, 16, 8, 5, tma=False), Config(128, 64, 16, 8, 5, tma=False)])],
}
_FULL["rows_k"] = _FULL["rows"]

_INTERPRETED = Config(16, 16, 16, 1, 1, group_m=2)

_forced: dict[str, Config] = {}


@contextlib.contextmanager
def forced(configs: Mapping[str, Config]) -> Iterator[None]:
    """Use these configurations, by kernel name, inside the block."""
    global _forced
    before, _forced = _forced, {**_forced, **configs}
    try:
        yield
    finally:
        _forced = before


@cache
def has_tma(device: torch.device) -> bool:
    """Whether tensors of this device can be read through a TMA descriptor (Hopper and newer; the interpreter)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def candidates(problem: Problem) -> list[Config]:
    """Configurations worth trying, the shipped default first."""
    table = (_FULL if problem.dtype == torch.float32 else _HALF)[problem.kernel]
    tiles = next(tiles for largest, tiles in table if problem.bucket <= largest)
    if problem.kernel == "up" and problem.halves == 1:  # one accumulator where a gated activation has two
        largest = 64 * 64 if problem.dtype == torch.float32 else 128 * 128
        tiles = [replace(c, block_n=2 * c.block_n) if c.block_m * c.block_n < largest else c for c in tiles]
    return tiles


def all_problems() -> Iterator[Problem]:
    """One problem for each list of candidates."""
    for dtype, table in ((torch.bfloat16, _HALF), (torch.float16, _HALF), (torch.float32, _FULL)):
        for kernel, by_rows in table.items():
            for halves in (1, 2) if kernel in ("up", "dact") else (1,):
                for largest, _ in by_rows:
                    yield Problem(kernel, dtype, 8 * largest, 8, 1024, 2048, halves)


def choose(problem: Problem, device: torch.device) -> Config:
    """The configuration for a problem without tuning: forced, tuned before on this device, or shipped."""
    if problem.kernel in _forced:
        return _forced[problem.kernel]
    if device.type == "cpu":
        return _INTERPRETED
    if device.type == "cuda" and (tuned := _tuned(device).get(problem.key())):
        return tuned
    choices = candidates(problem)
    if has_tma(device):
        return choices[0]
    # Pointers to a wide tile of weights cost the registers that a wide accumulator needs.
    narrow = (c for c in choices if c.block_m * c.block_n * problem.halves <= 128 * 128)
    return next(narrow, choices[0])


def run(problem: Problem, device: torch.device, kernel: Callable[[Config], None]) -> None:
    """Run a kernel with the configuration chosen for the problem; tune first if that is asked for."""
    if (
        os.environ.get("SCATTERFOLD_AUTOTUNE") == "1"
        and device.type == "cuda"
        and problem.kernel not in _forced
        and problem.key() not in _tuned(device)
        and not torch.cuda.is_current_stream_capturing()
    ):
        _tune(problem, device, kernel)
    kernel(choose(problem, device))


def _tune(problem: Problem, device: torch.device, kernel: Callable[[Config], None]) -> None:
    """Time the candidates, then vary how the best one walks over its tiles."""
    timed: dict[Config, float] = {}

    def measure(options: list[Config]) -> Config:
        for option in options:
            with contextlib.suppress(triton.runtime.errors.OutOfResources):
                milliseconds = triton.testing.do_bench(lambda option=option: kernel(option), rep=30)
                timed[option] = float(milliseconds)  # pyright: ignore[reportArgumentType]
        return min(timed, key=timed.__getitem__, default=options[0])

    best = measure(candidates(problem))
    best = measure([replace(best, persistent=True), replace(best, tma=False)])
    best = measure([replace(best, group_m=group_m) for group_m in (4, 16)])
    _tuned(device)[problem.key()] = best
    _save(device)


def cache_file(device: torch.device) -> Path:
    """Where tuned configurations of this device and version of triton are kept; SCATTERFOLD_CACHE names the folder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return cache_folder() / f"triton-{name.replace(' ', '-').replace('/', '-')}-{triton.__version__}.json"


def read_cache(path: Path) -> dict[str, Config]:
    """The tuned configurations in a file; nothing if it is missing or not ours (another version wrote it)."""
    try:
        return {key: Config(**fields) for key, fields in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_cache(path: Path, tuned: Mapping[str, Config]) -> None:
    """Add configurations to a file, in one step, so that processes tuning side by side never read half of it."""
    merged = {**read_cache(path), **tuned}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump({key: asdict(config) for key, config in sorted(merged.items())}, file, indent=1)
    os.replace(file.name, path)


@cache
def _tuned(device: torch.device) -> dict[str, Config]:
    return read_cache(cache_file(device))


def _save(device: torch.device) -> None:
    with contextlib.suppress(OSError):  # a read-only home costs a repeated tuning, nothing else
        write_cache(cache_file(device), _tuned(device))
