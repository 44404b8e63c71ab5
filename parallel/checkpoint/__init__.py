"""Checkpoints: written whole or not at all, read by any layout."""

from .checkpointer import Checkpointer
from .distributed import open_checkpoint
from .fill import fill
from .lazy import LazyTensor
from .read import (
    check_fits,
    check_sums,
    check_whole,
    checkpoints,
    find_checkpoint,
    load,
    newest_checkpoint,
    read_meta,
    read_shapes,
)
from .state import model_state, optimizer_state

__all__ = [
    "Checkpointer",
    "LazyTensor",
    "check_fits",
    "check_sums",
    "check_whole",
    "checkpoints",
    "fill",
    "find_checkpoint",
    "load",
    "model_state",
    "newest_checkpoint",
    "open_checkpoint",
    "optimizer_state",
    "read_meta",
    "read_shapes",
]
