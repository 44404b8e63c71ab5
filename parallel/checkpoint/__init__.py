"""Checkpoints: written whole or not at all, read by any layout."""

from .checkpointer import Checkpointer
from .consolidated import WEIGHTS, WEIGHTS_INDEX
from .read import (
    WholeTensors,
    check_fits,
    check_whole,
    checkpoints,
    find_checkpoint,
    load,
    load_weights,
    newest_checkpoint,
    read_meta,
    read_shapes,
)
from .state import model_state, optimizer_state

__all__ = [
    "WEIGHTS",
    "WEIGHTS_INDEX",
    "Checkpointer",
    "WholeTensors",
    "check_fits",
    "check_whole",
    "checkpoints",
    "find_checkpoint",
    "load",
    "load_weights",
    "model_state",
    "newest_checkpoint",
    "optimizer_state",
    "read_meta",
    "read_shapes",
]
