"""The words after `scatterfold bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..arguments import argument
from ..subcommands import run_subcommand

HELP = """Measure speed and memory.

  kernels           the expert kernels against their peers and against dense layers
  kernels report    table, plot and page from the JSON files of earlier runs
  dispatch          bytes that expert parallelism sends, against the least possible, and the time of a layer
  scaling           a training step layout by layout: time, memory, and bytes sent against the formula
  upcycling         train a dense model, then compare at equal extra FLOPs: dense, upcycled, MoE from scratch

Example:
  scatterfold bench kernels shapes=e64k8f256 dtypes=bf16 output=results"""


@dataclass(frozen=True)
class Kernels:
    """Measure the expert kernels beside every peer that is installed and beside dense layers of equal FLOPs.

    All of them compute with the same weights in one process. Their calls are interleaved, and the median counts. What
    computes something else, or fails, is marked and not ranked. "Dense (a)" is a SwiGLU MLP of width F over T x K
    contiguous rows, "dense (b)" one of width K x F over T rows. OUTPUT receives kernels.json, .md and .png.
    """

    EXAMPLE: ClassVar[str] = "scatterfold bench kernels shapes=e64k8f256,e64k8f512_t64 dtypes=bf16 output=results"

    device: str = argument("where to compute", default="auto", choices=("auto", "cpu", "cuda"))
    shapes: str = argument("names as A,B, or numbers as T,D,F,E,K, separated by ; (all of the device)", default="")
    dtypes: tuple[str, ...] | None = argument("of fp32, bf16, fp16 (fp32,bf16)", default=None)
    entries: tuple[str, ...] | None = argument("what to measure beside the default backend and dense", default=None)
    threads: int | None = argument("of the CPU, torch's choice if not given", default=None, least=1)
    seconds: float = argument("to spend on timing each shape and dtype; at least 3 calls", default=20.0, least=0.0)
    routing: str = argument("of tokens to experts", default="balanced", choices=("balanced", "uniform", "zipf"))
    seed: int = argument("of inputs, weights and routing", default=0, least=0)
    output: Path | None = argument("folder for table, plot and JSON", default=None)
    json: Path | None = argument("also write the raw figures to this file", default=None)


@dataclass(frozen=True)
class Report:
    """Make OUTPUT/kernels.json, kernels.md and kernels.png from the JSON files of one run or several.

    Where two files hold the same measurement, the later one counts. A ratio is always one of times of the same run.
    """

    EXAMPLE: ClassVar[str] = "scatterfold bench kernels report source=[a.json,b.json] output=results"

    source: tuple[Path, ...] = argument("files that `scatterfold bench kernels json=FILE` wrote, as [A,B]")
    output: Path = argument("folder for table, plot and JSON")
    page: Path | None = argument("also replace the tables in this Markdown page, between its two markers", default=None)


@dataclass(frozen=True)
class Dispatch:
    """Measure token dispatch between processes that it starts itself, over gloo or NCCL.

    Bytes are counted from the tensors that are handed to collectives. They are held against the bound, one row and one
    sum back for each distinct (token, other rank) pair, and against sending one copy per (token, expert).
    """

    EXAMPLE: ClassVar[str] = "scatterfold bench dispatch ranks=4 shapes=1024,512,256,64,8 routings=uniform,zipf"

    ranks: int = argument("processes; ep is RANKS / ETP", default=4, least=2)
    etp: int = argument("ranks over which each expert is cut", default=1, least=1)
    device: str = argument("auto: cuda if there are enough", default="auto", choices=("auto", "cpu", "cuda"))
    shapes: str = argument("names as A,B, or numbers as T,D,F,E,K, separated by ; T is of each rank", default="")
    routings: tuple[str, ...] | None = argument("of balanced, uniform, zipf, hot_rank (uniform,zipf)", default=None)
    dispatchers: tuple[str, ...] | None = argument("of all_to_all, all_gather (both)", default=None)
    dtype: str = argument("of the tokens", default="bf16", choices=("fp32", "bf16", "fp16"))
    chunks: int = argument("into which the tokens are cut", default=1, least=1)
    capacity_factor: float | None = argument("bound of the buffers; null for none", default=None)
    repeats: int = argument("timed calls, whose median counts", default=5, least=1)
    seed: int = argument("of inputs, weights and routing", default=0, least=0)
    timeout: float = argument("seconds until the ranks are stopped", default=600.0, least=1.0)
    json: Path | None = argument("also write the raw figures of every rank to this file", default=None)


@dataclass(frozen=True)
class Scaling:
    """Measure a training step of a small MoE transformer in several layouts, over processes that it starts itself.

    Every layout trains the same model on the same batch. Bytes are counted where torch hands tensors to its
    collectives, and held against the formula of each kind of traffic.
    """

    EXAMPLE: ClassVar[str] = "scatterfold bench scaling ranks=2 layouts='dp_shard=2; ep=2; tp=2' json=scaling.json"

    ranks: tuple[int, ...] = argument("numbers of processes, as A,B", default=(1, 2, 4), least=1)
    layouts: str = argument("`size=N size=N`, separated by ; (several of each number of ranks)", default="")
    device: str = argument("auto: cuda if there are enough", default="auto", choices=("auto", "cpu", "cuda"))
    precision: str = argument("of matrix products", default="fp32", choices=("fp32", "bf16"))
    layers: int = argument("of the model, each with experts", default=4, least=1)
    width: int = argument("of the model", default=256, least=1)
    heads: int = argument("of attention", default=8, least=1)
    experts: int = argument("of each layer", default=8, least=1)
    top_k: int = argument("experts of a token", default=2, least=1)
    expert_width: int = argument("of each expert", default=256, least=1)
    vocabulary: int = argument("tokens that there are", default=512, least=2)
    length: int = argument("tokens of a sequence", default=128, least=1)
    sequences: int = argument("of a batch, over all ranks", default=8, least=1)
    micro_batches: int = argument("into which a rank cuts its share", default=2, least=1)
    steps: int = argument("timed steps, whose median counts", default=5, least=1)
    seed: int = argument("of the tokens", default=0, least=0)
    timeout: float = argument("seconds until the ranks of a layout are stopped", default=600.0, least=1.0)
    json: Path | None = argument("also write the figures of every rank to this file", default=None)


@dataclass(frozen=True)
class Upcycling:
    """Train a dense model, then spend the same extra FLOPs on it, on its upcycled MoEs and on a MoE from scratch.

    The settings of all runs are configs/experiment/upcycling.yaml. Finished runs in OUTPUT are not trained again, and
    an interrupted one goes on, so the same command continues a comparison. OUTPUT receives upcycling.json, the figure
    upcycling.png and the tables as README.md, in which text outside of the tables stays.
    """

    EXAMPLE: ClassVar[str] = "scatterfold bench upcycling output=runs/upcycling seeds=[0,1,2] data=my/texts"

    output: Path = argument("folder for runs, table, plot and JSON")
    seeds: tuple[int, ...] = argument(
        "one dense training and its successors each, as [A,B]", default=(0, 1, 2), least=0
    )
    data: Path | None = argument("file or folder of text, the standard library's source if not given", default=None)
    steps: int | None = argument("of the dense training (1000)", default=None, least=1)
    extra: tuple[float, ...] = argument("budgets, in FLOPs of the dense training", default=(0.25, 0.5, 1.0))
    arms: tuple[str, ...] | None = argument(
        "of dense, sparse, fine_grained, scratch, scratch_fine (all but the last)", default=None
    )
    all_flops: bool = argument(
        "also give a MoE from scratch the dense training's FLOPs and the largest budget", default=True
    )
    changes: tuple[str, ...] = argument("of the configuration, as [KEY=VALUE,KEY=VALUE]", default=())
    speed: bool = argument("measure inference too, unless OUTPUT/speed.json is there", default=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["kernels", "report"]:
        return run_subcommand("bench kernels", HELP, {"report": (Report, _report)}, words[1:])
    commands = {
        "kernels": (Kernels, _kernels),
        "dispatch": (Dispatch, _dispatch),
        "scaling": (Scaling, _scaling),
        "upcycling": (Upcycling, _upcycling),
    }
    return run_subcommand("bench", HELP, commands, words)


def _kernels(settings: Kernels) -> int:
    from .kernels.run import run

    return run(settings)


def _dispatch(settings: Dispatch) -> int:
    from .dispatch.run import run

    return run(settings)


def _scaling(settings: Scaling) -> int:
    from .scaling.run import run

    return run(settings)


def _upcycling(settings: Upcycling) -> int:
    from .upcycling.run import run

    return run(settings)


def _report(settings: Report) -> int:
    from .kernels.report import write_report
    from .kernels.results import merge, read_results

    merged = merge([read_results(path) for path in settings.source])
    for path in write_report(merged, settings.output, settings.page):
        print(f"written: {path}")
    return 0
