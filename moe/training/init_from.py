"""The configuration of a run that begins with a model which lies in a folder and is to be trained on as it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...kernels import CheckpointError
from ...parallel.checkpoint import newest_checkpoint, read_meta
from ..data.tokenizer import Tokenizer
from ..interop.open import open_source
from .run_folder import RunFolder

GROUPS = ("model", "router", "experts")
# How experts are computed, which is a matter of the machine and not of the model.
OF_THE_MACHINE = ("backend", "recompute")


def groups_of(source: str, run_dir: Path | None) -> dict[str, dict[str, Any]]:
    """The groups `model`, `router` and `experts` of the model in a folder, and of `data` its tokenizer if it has one.

    Args:
        source: a folder of any format.
        run_dir: of the run. If it has begun and the source is gone, the groups are those it has begun with.

    Raises: CheckpointError, ConfigError or DataError if the model cannot be opened.
    """
    try:
        stored = open_source(source, "init_from", checked=False)
    except CheckpointError:
        begun = None if run_dir is None else newest_checkpoint(RunFolder(run_dir).checkpoints)
        if begun is None:
            raise
        config = read_meta(begun)["config"]
        data = {key: config["data"].get(key) for key in ("tokenizer", "eod")}
        return {**_model_groups(config), "data": data if data["tokenizer"] != "bytes" else {}}
    return {**_model_groups(stored.config), "data": _data_of(stored.tokenizer)}


def _model_groups(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    groups = {group: dict(config[group]) for group in GROUPS}
    for name in OF_THE_MACHINE:
        groups["experts"].pop(name, None)
    return groups


def _data_of(tokenizer: Tokenizer | None) -> dict[str, Any]:
    spec = {} if tokenizer is None else tokenizer.spec()
    if "path" not in spec:
        return {}
    return {"tokenizer": os.path.abspath(getattr(tokenizer, "path", spec["path"])), "eod": spec["eod"]}
