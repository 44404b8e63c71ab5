"""Safetensors files of limited size, written one at a time from lazy tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...parallel.checkpoint.lazy import LazyTensor
from ...parallel.checkpoint.safetensors_files import WEIGHTS, index_of


def write_shards(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    max_shard_bytes: int,
    rank: int = 0,
    world: int = 1,
    weights: str = WEIGHTS,
) -> tuple[str, ...]:
    """Write the tensors in their order, the index too where there are several files; returns the files' names.

    The tensors of one file are in memory at a time.

    Args:
        folder: an existing one.
        max_shard_bytes: of tensors in one file; a tensor that is larger has a file of its own.
        rank, world: every rank writes its share of the files, rank 0 the index; the bytes do not depend on it.
        weights: name of the file where there is only one; the others are named after it.

    Raises: OSError as any writing does; CheckpointError if a source cannot be read.
    """
    files = split_files({name: tensor.bytes for name, tensor in tensors.items()}, max_shard_bytes, weights)
    for number, (file, names) in enumerate(files.items()):
        if number % world == rank:
            save_tensors({name: tensors[name].read() for name in names}, folder / file)
    if len(files) > 1 and rank == 0:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(tensor.bytes for tensor in tensors.values())
        write_json(folder / index_of(weights), {"metadata": {"total_size": total}, "weight_map": weight_map})
    return tuple(files)


def split_files(sizes: Mapping[str, int], most: int, weights: str = WEIGHTS) -> dict[str, list[str]]:
    """Names of tensors by file, in their order: a file is full when the next tensor would take it over `most` bytes."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {weights: shards[0]}
    stem = weights.removesuffix(".safetensors")
    return {f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards)}


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Raises: OSError as any writing does: the library puts the system's error number into a text."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
