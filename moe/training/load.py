"""Load a trained model from a run folder or one of its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ...kernels import CheckpointError
from ...parallel.checkpoint import Checkpointer, newest_checkpoint, read_meta
