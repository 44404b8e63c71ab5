"""Where in a folder of Megatron's the tensors lie: Megatron-LM, Megatron-Bridge and NeMo each add a level or two."""

from __future__ import annotations

import json
from pathlib import Path

from ....kernels import CheckpointError
from ....parallel.checkpoint.index import INDEX

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
BACKEND = "metadata.json"  # written last, so it also says that the checkpoint is whole
COMMON = "common.pt"
FORMAT = "torch_dist"
_NEMO = "weights"
_LEGACY = ("mp_rank_*/model_optim_rng.pt", "mp_rank_*/model_rng.pt", "mp_rank_*/distrib_optim.pt")


def is_megatron(folder: Path) -> bool:
    """Whether Megatron wrote a folder, in whatever format: also what `open_megatron` then refuses to read."""
    folder = Path(folder)
    return any((folder / name).is_file() for name in (TRACKER, BACKEND, f"{_NEMO}/{BACKEND}", COMMON)) or _legacy(
        folder
    )


def find_weights(folder: Path) -> Path:
    """The folder that holds the tensors of the newest checkpoint.

    Raises: CheckpointError if there is none, it is not whole, or it is of a format other than torch_dist.
    """
    folder = Path(folder)
    found = folder
    if (folder / TRACKER).is_file():
        found = folder / _newest(folder / TRACKER)
        if not found.is_dir():
            raise CheckpointError(f"{found} is missing, but {folder / TRACKER} names it")
    elif (folder / _NEMO / BACKEND).is_file():
        found = folder / _NEMO
    if _legacy(found):
        raise CheckpointError(
            f"{found} is a checkpoint of Megatron's old format (mp_rank_*, pickled per rank), allowed: {FORMAT}, as "
            "Megatron-LM writes it with --ckpt-format torch_dist"
        )
    if not (found / BACKEND).is_file():
        raise CheckpointError(
            f"{found} has no {BACKEND}, so it is not whole or not of the format {FORMAT}, allowed: a whole checkpoint "
            f"of that format"
        )
    _check_backend(found / BACKEND)
    if not (found / INDEX).is_file():
        raise CheckpointError(f"{found / INDEX} is missing: {found} is not a whole checkpoint")
    return found


def _newest(tracker: Path) -> str:
    text = tracker.read_text(errors="replace").strip()
    if text == RELEASE:
        return RELEASE
    if not text.isdecimal():
        raise CheckpointError(f"{tracker} is damaged: {text[:40]!r}, allowed: a number of steps, or {RELEASE}")
    return f"iter_{int(text):07d}"


def _check_backend(file: Path) -> None:
    try:
        described = json.loads(file.read_bytes())
        backend, version = described["sharded_backend"], described.get("sharded_backend_version", 1)
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file} is damaged: it does not name a sharded_backend") from None
    if (backend, version) != (FORMAT, 1):
        raise CheckpointError(f"{file}: sharded_backend={backend} version {version}, allowed: {FORMAT} version 1")


def _legacy(folder: Path) -> bool:
    return any(True for pattern in _LEGACY for _ in folder.glob(pattern))
