"""Weights of a whole model in one folder of safetensors files, as `scatterfold convert` writes and others share them.

The files carry the bare names of parameters and buffers, and model.safetensors.index.json says which file holds which
where there are several (the sharded format of Hugging Face).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.errors import CheckpointError
from .state import MODEL

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


def is_consolidated(path: Path) -> bool:
    """Whether a folder holds such weights."""
    return any((Path(path) / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))


def consolidated_shapes(path: Path) -> dict[str, torch.Size]:
    """Shapes of all tensors by the names that a checkpoint gives them; only the head of each file is read.

    Raises: CheckpointError if a file is missing or damaged, or does not hold what the index says.
    """
    from safetensors import SafetensorError, safe_open

    held: dict[str, torch.Size] = {}
    weight_map = _read_weight_map(path)
    for name in [WEIGHTS] if weight_map is None else sorted(set(weight_map.values())):
        try:
            with safe_open(path / name, framework="pt") as file:
                keys = file.keys()
                found = {key: torch.Size(file.get_slice(key).get_shape()) for key in keys}
        except FileNotFoundError:
            raise CheckpointError(f"{path / name} is missing, but {path / WEIGHTS_INDEX} names it") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path / name} is damaged: {error}") from None
        lacking = [key for key, file in (weight_map or {}).items() if file == name and key not in found]
        if lacking:
            raise CheckpointError(f"{path / name} does not hold {lacking[0]}, but {path / WEIGHTS_INDEX} says so")
        held.update(found)
    return {f"{MODEL}{name}": shape for name, shape in held.items()}


def read_consolidated(path: Path, state: Mapping[str, Tensor]) -> None:
    """Read tensors in place, of sharded ones this rank's part only; a dtype that differs is converted."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    bare = {name.removeprefix(MODEL): tensor for name, tensor in state.items()}
    load(bare, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


def _read_weight_map(path: Path) -> dict[str, str] | None:
    """Which file holds which tensor; None if there is one file without an index."""
    file = path / WEIGHTS_INDEX
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
