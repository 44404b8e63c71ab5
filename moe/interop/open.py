"""Open a model that lies in a folder, whatever wrote it: the format is told by what the folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...kernels import CheckpointError, ConfigError
from ...parallel.checkpoint import check_sums, check_whole, find_checkpoint, read_meta
from ...parallel.checkpoint.distributed import open_checkpoint
from ...parallel.checkpoint.read import META
from ...parallel.checkpoint.state import MODEL, OPTIMIZER
from ...parallel.process import place, together
from ..build import ModelPlan
from ..data.tokenizer import tokenizer_from
from .scatterfold import DESCRIPTION, is_scatterfold, open_scatterfold
from .stored import GROUPS, StoredModel

ALLOWED = (
    "a run folder, one of its checkpoints, a folder of scatterfold convert, a Hugging Face folder or a Megatron "
    "checkpoint"
)


def open_model(source: str | Path, checked: bool = True, **options: Any) -> StoredModel:
    """The model of a folder, before any of its tensors is read. Among several ranks, every one must call it.

    Args:
        source: a run folder (its newest whole checkpoint is taken), one of its checkpoints, a folder that `write_model`
            wrote, or one that Hugging Face or Megatron-Core wrote.
        checked: see that the tensors are those of its config, and compare the checksums of a checkpoint, of which each
            rank reads its share.
        options: of one format only: `describe` of a Megatron checkpoint.

    Raises: CheckpointError if the folder is of no format, incomplete or damaged, or its tensors are not those of its
        config; DataError if its tokenizer's file is gone or has changed; ConfigError if its config asks for what
        Scatterfold does not have.
    """
    folder = Path(source).expanduser()
    stored = together(lambda: _open(folder, {name: value for name, value in options.items() if value is not None}))
    if checked:
        if stored.format == "checkpoint":
            together(lambda: check_sums(stored.source, read_meta(stored.source)["files"], *place()))
        together(stored.checked)
    return stored


def open_source(source: str | Path, option: str, checked: bool = True, **options: Any) -> StoredModel:
    """`open_model` of what an option of a command or a config names. Raises: CheckpointError that names it too."""
    try:
        return open_model(source, checked, **options)
    except CheckpointError as error:
        raise CheckpointError(f"{option}={source}: {error}") from None


def _open(folder: Path, options: Mapping[str, Any]) -> StoredModel:
    from .huggingface import is_huggingface, open_huggingface
    from .megatron import is_megatron, open_megatron

    if is_megatron(folder):  # first: a file that says more than Megatron's own may lie beside its tensors
        return open_megatron(folder, **options)
    if options:
        name, value = next(iter(options.items()))
        raise ConfigError(f"{name}={value} does not go with {folder}, allowed: for a Megatron checkpoint only")
    if is_scatterfold(folder):
        return open_scatterfold(folder)
    if (folder / META).is_file() or (folder / "checkpoints").is_dir() or any(folder.glob("step-*")):
        return _open_checkpoint(find_checkpoint(folder))
    if is_huggingface(folder):
        return open_huggingface(folder)
    raise _no_model(folder)


def _open_checkpoint(path: Path) -> StoredModel:
    meta = check_whole(path)
    if not {"config", "tokenizer"} <= meta.keys():
        raise CheckpointError(f"{path} does not say which model it holds, allowed: a checkpoint of a run")
    tokenizer = tokenizer_from(meta["tokenizer"], path.parent.parent)
    config = {group: meta["config"][group] for group in GROUPS}
    vocab_size = ModelPlan.from_config(config, tokenizer.vocab_size).config.vocab_size
    return StoredModel(
        source=path,
        format="checkpoint",
        config={**config, "model": {**config["model"], "vocab_size": vocab_size}},
        tensors=open_checkpoint(path, MODEL, checked=False),
        tokenizer=tokenizer,
        step=meta["step"],
        optimizer=open_checkpoint(path, OPTIMIZER, checked=False),
    )


def _no_model(folder: Path) -> CheckpointError:
    if not folder.exists():
        return CheckpointError(f"{folder} does not exist, allowed: {ALLOWED}")
    if not folder.is_dir():
        return CheckpointError(f"{folder} is no folder, allowed: {ALLOWED}")
    looked_for = f"checkpoints/, {META}, {DESCRIPTION}, config.json of Hugging Face, metadata.json of Megatron"
    return CheckpointError(f"{folder} holds no model (none of {looked_for}), allowed: {ALLOWED}")
