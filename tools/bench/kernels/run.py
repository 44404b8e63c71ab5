"""The command: choose, measure case after case, show and keep what is there already."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ....kernels import ConfigError
from ....moe.training.environment import device_name, package_version
from ...close_match import did_you_mean
from ...files import check_target
from .case import DTYPES, make_case
from .clock import measure_peak
from .entries import chosen_entries
from .measure import measure_case, one_line
from .report import make_folder, write_report
from .results import Conditions, Run, write_results
from .shapes import parse_shapes
from .table import print_case

if TYPE_CHECKING:
    from ..command import Kernels

PACKAGES = ("scatterfold", "torch", "triton", "transformers", "deepspeed", "scattermoe", "sonicmoe", "megablocks")


def run(settings: Kernels) -> int:
    """Measure; returns the exit code. After each case the JSON files hold all that was measured so far."""
    device = _device(settings.device)
    shapes = parse_shapes(settings.shapes, device.type)
    dtypes = _dtypes(settings.dtypes)
    entries = chosen_entries(settings.entries)
    check_target(settings.json)
    if settings.output is not None:
        make_folder(settings.output)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    measured = Run(_conditions(settings, device), [_command_line(settings)], [])
    complete = True
    with _quiet_libraries():
        peaks = {name: measure_peak(device, DTYPES[name]) for name in dtypes}
        for shape in shapes:
            for name in dtypes:
                print(f"measuring {shape.name} {name}", file=sys.stderr)
                try:
                    case = make_case(shape, DTYPES[name], device, settings.routing, settings.seed)
                    passes = measure_case(case, name, entries, settings.seconds, peaks[name])
                except torch.OutOfMemoryError as error:
                    print(f"{shape.name} {name} is left out: {one_line(error)}", file=sys.stderr)
                    complete = False
                    continue
                finally:
                    case = None  # its memory is for the next one
                    if device.type == "cuda":
                        torch.cuda.empty_cache()  # in one piece
                measured.cases.extend(passes)
                for result in passes:
                    print_case(result)
                _keep(settings, measured)
    if settings.output is not None:
        for path in write_report([measured], settings.output, None):
            print(f"written: {path}")
    return 0 if complete else 1


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda is not here, allowed: cpu")
    return torch.device(name)


def _dtypes(names: tuple[str, ...] | None) -> list[str]:
    for name in names or ():
        if name not in DTYPES:
            raise ConfigError(f"dtypes={name} is unknown{did_you_mean(name, DTYPES)}, allowed: {', '.join(DTYPES)}")
    return list(dict.fromkeys(names or ("fp32", "bf16")))


def _keep(settings: Kernels, measured: Run) -> None:
    if settings.json is not None:
        write_results(settings.json, [measured])
    if settings.output is not None:
        write_results(settings.output / "kernels.json", [measured])


def _conditions(settings: Kernels, device: torch.device) -> Conditions:
    versions = {"python": sys.version.split()[0]}
    versions |= {name: version for name in PACKAGES if (version := package_version(name))}
    versions["torch"] = torch.__version__  # it alone says which CUDA the build is for
    return Conditions(
        device=device_name(device),
        device_type=device.type,
        threads=torch.get_num_threads(),
        versions=versions,
        routing=settings.routing,
        seed=settings.seed,
    )


def _command_line(settings: Kernels) -> str:
    """What to type to measure again, without where the files went."""
    words = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default and field.name not in ("json", "output"):
            text = ",".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
            words.append(f"{field.name}={text}")
    return shlex.join(["scatterfold", "bench", "kernels", *words])


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Peers log while they are built; a table is no place for it."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
