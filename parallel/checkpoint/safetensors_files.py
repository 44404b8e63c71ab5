"""Safetensors files of one folder, in one file or in shards with an index (the format of Hugging Face)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.errors import CheckpointError
from .lazy import Index, LazyTensor

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


def index_of(weights: str) -> str:
    """Name of the index of files that together hold what one file of this name would."""
    return f"{weights}.index.json"


def has_safetensors(folder: Path, weights: str = WEIGHTS) -> bool:
    """Whether a folder holds such weights."""
    return any((Path(folder) / name).is_file() for name in (weights, index_of(weights)))


def open_safetensors(folder: Path, weights: str = WEIGHTS) -> dict[str, LazyTensor]:
    """All tensors of a folder by the names in the files; only the head of each file is read.

    Args:
        weights: name of the file where there is only one; an index beside it is named after it.

    Raises: CheckpointError if a file is missing, truncated or damaged, or does not hold what the index says.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    index = folder / index_of(weights)
    weight_map = _read_weight_map(index)
    tensors: dict[str, LazyTensor] = {}
    for name in [weights] if weight_map is None else sorted(set(weight_map.values())):
        file = folder / name
        try:
            with safe_open(file, framework="pt") as opened:
                keys = list(opened.keys())
                held = {key: _lazy(file, key, opened.get_slice(key)) for key in keys}
        except FileNotFoundError:
            reason = f"but {index} names it" if weight_map else f"allowed: {weights} or {index.name}"
            raise CheckpointError(f"{file} is missing, {reason}") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
        lacking = [key for key, where in (weight_map or {}).items() if where == name and key not in held]
        if lacking:
            raise CheckpointError(f"{file} does not hold {lacking[0]}, but {index} says so")
        tensors.update(held)
    return tensors


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _lazy(file: Path, key: str, opened) -> LazyTensor:  # noqa: ANN001: the library's slice has no public type
    name = opened.get_dtype()
    if name not in DTYPES:
        raise CheckpointError(f"{file}: {key} has dtype {name}, allowed: {', '.join(DTYPES)}")
    return LazyTensor(torch.Size(opened.get_shape()), DTYPES[name], _reader(file, key))


def _reader(file: Path, key: str) -> Callable[[Index], Tensor]:
    def fetch(index: Index) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                if not index:
                    return opened.get_tensor(key)
                # The slice is a view of what the file maps: a copy lets go of it, and may be written to.
                return opened.get_slice(key)[index].clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {key} cannot be read: {error}") from None

    return fetch


def _read_weight_map(file: Path) -> dict[str, str] | None:
    """Which file holds which tensor; None if there is one file without an index."""
    if not file.is_file():
        return None
    try:
        weight_map = json.loads(file.read_bytes())["weight_map"]
        outside = [name for name in weight_map.values() if Path(name).name != name]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file} is damaged: it has no weight_map of tensors to files") from None
    if outside:
        raise CheckpointError(f"{file} points outside of the folder, to {outside[0]}")
    return weight_map
