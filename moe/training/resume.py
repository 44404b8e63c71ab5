"""Where a run starts from: nothing, its own newest checkpoint, another run's, or the weights of another run.

A resumed run must be the same run. What defines the model and what it reads stays as it was: `seed`, `model`,
`router`, `experts`, `data` and the kind of optimizer. Everything else may change: steps, schedule, learning rate,
precision, intervals, logging, layout, engine and launcher.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...kernels import CheckpointError, ConfigError, DataError
from ...parallel.checkpoint import find_checkpoint, newest_checkpoint, read_meta
from ..interop.open import open_source
from .progress import Progress
from .run_folder import RunFolder

FIXED = ("seed", "model", "router", "experts", "data", "optimizer._target_")
FREE_WITHIN_FIXED = ("experts.backend", "data.cache_dir", "data.micro_batch_size", "data.workers", "data.prefetch")


@dataclass(frozen=True)
class Start:
    """What to load before the first step.

    Attributes:
        checkpoint: None to begin with fresh weights; a model of any format where `weights_only`.
        meta: of the checkpoint; of another model its tokenizer, if that is known.
        weights_only: take the weights and begin a new run with them.
        with_optimizer: take what the optimizer remembers too.
    """

    checkpoint: Path | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    weights_only: bool = False
    with_optimizer: bool = False

    @property
    def resumes(self) -> bool:
        return self.checkpoint is not None and not self.weights_only

    def progress(self) -> Progress:
        """Where the run stands before its first step of now."""
        return Progress(**self.meta["progress"]) if self.resumes else Progress()

    def is_finished(self, steps: int) -> bool:
        """Whether the run has done all its steps and its last evaluation; raise trainer.steps to go on."""
        return self.resumes and bool(self.meta.get("finished")) and self.progress().step >= steps

    def rests(self, stop_after: int | None) -> bool:
        """Whether the run has got to the step after which it is to stop, and was evaluated there."""
        if stop_after is None or not self.resumes or self.meta.get("evaluation") is None:
            return False
        return self.progress().step >= stop_after


def choose_start(config: Mapping[str, Any], folder: RunFolder) -> Start:
    """Follow `resume` (auto, never, or a path, which is taken whatever the run folder holds), `init_from` and
    `init_optimizer`.

    Raises: ConfigError if they contradict the run folder, or a field that defines the resumed run has changed;
        CheckpointError if there is no whole checkpoint where one is asked for, or it holds another model.
    """
    resume, init_from = config.get("resume") or "auto", config.get("init_from")
    own = newest_checkpoint(folder.checkpoints)
    if resume == "never" and (own is not None or folder.metrics.exists()):
        raise ConfigError(f"resume=never, but run_dir={folder.path} holds a run, allowed: auto, or another run_dir")
    if resume not in ("auto", "never"):
        asked = checkpoint_of(resume, "resume")
        if own is not None and asked.resolve().parent != own.resolve().parent:
            raise ConfigError(
                f"resume={resume} is not of the run in run_dir={folder.path}, allowed: auto, or another run_dir"
            )
        return _resumed(asked, config)
    if own is not None:
        return _resumed(own, config)
    if init_from:
        return _begun(init_from, bool(config.get("init_optimizer")))
    if config.get("init_optimizer"):
        raise ConfigError("init_optimizer=true without init_from, allowed: false, or init_from=DIR")
    return Start()


def checkpoint_of(source: str | Path, option: str) -> Path:
    """The checkpoint that an option names: one of its own, or the newest whole one of a run folder."""
    try:
        return find_checkpoint(Path(source).expanduser())
    except CheckpointError as error:
        raise CheckpointError(f"{option}={source}: {error}") from None


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise if a field that defines the run differs from the checkpoint's; a field that is new to it may differ."""
    old, new = flatten(before), flatten(now)
    for name, value in old.items():
        if _is_fixed(name) and new.get(name) != value:
            kind = CheckpointError if name.split(".")[0] in ("model", "router", "experts") else ConfigError
            raise kind(
                f"{name}={new.get(name)!r} differs from {checkpoint}, allowed: {value!r} to resume, or init_from to "
                "begin a new run with its weights"
            )


def check_same_data(start: Start, tokenizer: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raise DataError if the tokenizer, or for a resumed run the corpus, is not what the checkpoint was trained on."""
    if "tokenizer" not in start.meta:  # fresh weights, or those of a model that came without
        return
    trained_with, trained_on = _content(start.meta["tokenizer"]), _content(start.meta.get("data", {}))
    if trained_with != _content(tokenizer):
        raise DataError(f"data.tokenizer differs from that of {start.checkpoint}, allowed: {start.meta['tokenizer']}")
    now = _content(data)
    changed = sorted(key for key in {*trained_on, *now} if trained_on.get(key) != now.get(key))
    if start.resumes and changed:
        raise DataError(
            f"data.path: the corpus is not the one of {start.checkpoint}: {changed[0]} is {now.get(changed[0])}, "
            f"allowed: {trained_on.get(changed[0])}"
        )


def _content(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a corpus or a tokenizer is, wherever its files lie, as plain JSON values with dotted names."""
    flat = flatten(json.loads(json.dumps(description)))
    return {name: value for name, value in flat.items() if name.split(".")[-1] not in ("path", "prefix")}


def flatten(node: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> dict[str, Any]:
    """A tree as one mapping with dotted names; the entries of a list of mappings are numbered."""
    flat: dict[str, Any] = {}
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        is_list = isinstance(value, list | tuple)
        if isinstance(value, Mapping) or (is_list and any(isinstance(entry, Mapping) for entry in value)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if is_list else value
    return flat


def _resumed(checkpoint: Path, config: Mapping[str, Any]) -> Start:
    meta = read_meta(checkpoint)
    refuse_changes(meta["config"], config, checkpoint)
    return Start(checkpoint, meta)


def _begun(source: str, with_optimizer: bool) -> Start:
    """A new run with the weights of another model."""
    stored = open_source(source, "init_from", checked=False)  # the ranks check it together, where they read it
    if with_optimizer and not stored.optimizer:
        raise CheckpointError(
            f"init_optimizer=true, but {stored.source} holds no state of an optimizer, allowed: false, a run, or a "
            "folder with optimizer.safetensors"
        )
    meta = {} if stored.tokenizer is None else {"tokenizer": stored.tokenizer.spec()}
    return Start(stored.source, meta, weights_only=True, with_optimizer=with_optimizer)


def _is_fixed(name: str) -> bool:
    def within(groups: tuple[str, ...]) -> bool:
        return any(name == group or name.startswith(group + ".") for group in groups)

    return within(FIXED) and not within(FREE_WITHIN_FIXED)
