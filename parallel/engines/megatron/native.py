"""Megatron's own distributed checkpoints, written for its tools. We never read them: parts of them are pickled."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...process import barrier, place
from .part import MegatronPart

FOLDER = "megatron"
TRACKER = "latest_checkpointed_iteration.txt"  # where Megatron-LM looks for the newest with --load
_OPTIMIZER = "dp_reshardable"  # how it lays out what the distributed optimizer remembers: one process group is enough


def save_native(parts: Sequence[MegatronPart], optimizers: Any, checkpoints: Path, step: int) -> None:
    """Write model and optimizer to the folder `megatron` beside ours, and remove those of steps that ours has not.

    Every rank must call it.
    """
    from megatron.core import dist_checkpointing, parallel_state

    folder = checkpoints.parent / FOLDER
    own = folder / _name(step)
    rank, _ = place()
    if rank == 0:
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
    barrier()
    metadata = {
        "distrib_optim_sharding_type": _OPTIMIZER,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    names = ["model"] if len(parts) == 1 else [f"model{number}" for number in range(len(parts))]
    model = {name: part.module.sharded_state_dict(metadata=metadata) for name, part in zip(names, parts, strict=True)}
    state = {**model, "checkpoint_version": 3.0, "iteration": step}
    if any(optimizer.optimizer.state for optimizer in optimizers.chained_optimizers):
        state["optimizer"] = optimizers.sharded_state_dict(model, metadata=metadata)
    dist_checkpointing.save(state, str(own), content_metadata={key: metadata[key] for key in list(metadata)[:3]})
    if rank == 0:
        (folder / TRACKER).write_text(str(step))
        kept = {_name(int(path.name.removeprefix("step-"))) for path in checkpoints.glob("step-*")}
        for other in folder.glob("iter_*"):
            if other != own and other.name not in kept:
                shutil.rmtree(other, ignore_errors=True)


def _name(step: int) -> str:
    return f"iter_{step:07d}"
