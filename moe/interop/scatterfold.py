"""Scatterfold's own folder: safetensors files under our names, scatterfold.json, and the tokenizer's file.

scatterfold.json says which model it is, so the folder needs nothing else. The optimizer's state, where there is one, is
in files of its own; what a model carries along from another format lies beside, so that it gets back there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...kernels import CheckpointError
from ...parallel.checkpoint.safetensors_files import has_safetensors, open_safetensors
from ..data.tokenizer import Tokenizer, tokenizer_from
from .shards import write_json, write_shards
from .stored import GROUPS, StoredModel

DESCRIPTION = "scatterfold.json"
OPTIMIZER_FILE = "optimizer.safetensors"
FORMAT = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def is_scatterfold(folder: Path) -> bool:
    """Whether a folder was written by `write_scatterfold`."""
    return (Path(folder) / DESCRIPTION).is_file() and not (Path(folder) / "metadata.json").is_file()  # of Megatron


def open_scatterfold(folder: Path) -> StoredModel:
    """The model of a folder that `write_scatterfold` wrote; only heads of files are read.

    Raises: CheckpointError if a file is missing, damaged or of a newer version; DataError if it is the tokenizer's.
    """
    folder = Path(folder)
    described = read_description(folder)
    tensors = open_safetensors(folder)
    has_optimizer = has_safetensors(folder, OPTIMIZER_FILE)
    tokenizer = described.get("tokenizer")
    carried = {name: folder / name for name in (described.get("carried") or ())}
    for name, path in carried.items():
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing, but {folder / DESCRIPTION} names it")
    return StoredModel(
        source=folder,
        format="scatterfold",
        config=described["config"],
        tensors=tensors,
        tokenizer=None if tokenizer is None else tokenizer_from(tokenizer, folder),
        step=described["step"],
        optimizer=open_safetensors(folder, OPTIMIZER_FILE) if has_optimizer else {},
        carried=carried,
        origin=described.get("origin") or {},
    )


def write_scatterfold(
    stored: StoredModel, folder: Path, max_shard_bytes: int, rank: int = 0, world: int = 1
) -> tuple[str, ...]:
    """Write a model, with its optimizer's state if it has one, into a folder that exists; returns names of its files.

    Args:
        rank, world: every rank writes its share of the files, rank 0 what is small.

    Raises: OSError as any writing does; CheckpointError if the source cannot be read.
    """
    files = write_shards(folder, stored.tensors, max_shard_bytes, rank, world)
    if stored.optimizer:
        files += write_shards(folder, stored.optimizer, max_shard_bytes, rank, world, weights=OPTIMIZER_FILE)
    if rank == 0:
        for name, path in stored.carried.items():
            shutil.copyfile(path, folder / name)
        if stored.tokenizer is not None:
            stored.tokenizer.save(folder)
        write_json(folder / DESCRIPTION, describe(stored))
    return files


def dtype_names(stored: StoredModel) -> str:
    """The dtypes of a model's parameters as a config spells them: fp32, bf16, or both."""
    spelt = {dtype: name for name, dtype in DTYPES.items()}
    found = {stored.tensors[name].dtype for name in stored.parameters() if name in stored.tensors}
    return ", ".join(sorted(spelt.get(dtype, str(dtype).removeprefix("torch.")) for dtype in found))


def describe(stored: StoredModel) -> dict[str, Any]:
    """What scatterfold.json says of a model."""
    described = {
        "format": FORMAT,
        "step": stored.step,
        "dtype": dtype_names(stored),
        "tokenizer": _tokenizer_spec(stored.tokenizer),
        "config": {group: stored.config[group] for group in GROUPS},
    }
    if stored.carried:
        described["carried"] = sorted(stored.carried)
    if stored.origin:
        described["origin"] = dict(stored.origin)
    return described


def _tokenizer_spec(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    spec = dict(tokenizer.spec())
    if "path" in spec:
        spec["path"] = "tokenizer.json"  # its copy is in the folder, wherever it moves
    return spec


def read_description(folder: Path) -> dict[str, Any]:
    """The scatterfold.json of a folder, checked.

    Raises: CheckpointError if it is missing, damaged or of a newer version.
    """
    file = folder / DESCRIPTION
    try:
        described = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{file} is damaged: it is not JSON") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        found = described.get("format") if isinstance(described, dict) else None
        raise CheckpointError(f"{file} has format {found!r}, this version reads format {FORMAT}")
    config = described.get("config")
    for group in GROUPS:
        if not isinstance(config, Mapping) or not isinstance(config.get(group), Mapping):
            raise CheckpointError(f"{file} is damaged: its config has no {group}")
    for key, kind in {
        "step": int,
        "tokenizer": Mapping | None,
        "carried": list | None,
        "origin": Mapping | None,
    }.items():
        if not isinstance(described.get(key), kind):
            raise CheckpointError(f"{file} is damaged: {key}={described.get(key)!r}")
    return described
