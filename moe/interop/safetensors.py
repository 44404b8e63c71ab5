"""The whole model as safetensors files in one folder, from a checkpoint of any layout.

The files are in the sharded format of Hugging Face, with Scatterfold's own names and shapes. Beside them stand
scatterfold.json, from which the model can be built, and the tokenizer's file, so the folder needs nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels import CheckpointError, ConfigError
from ...parallel.checkpoint import (
    WEIGHTS,
    WEIGHTS_INDEX,
    WholeTensors,
    check_fits,
    find_checkpoint,
    model_state,
    read_meta,
)
from ...parallel.checkpoint.state import MODEL
from ..build import ModelPlan
from ..data.tokenizer import Tokenizer, tokenizer_from
from .folder import check_new, new_folder

DESCRIPTION = "scatterfold.json"
FORMAT = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODEL_GROUPS = ("model", "router", "experts", "dispatcher")


@dataclass(frozen=True)
class ExportReceipt:
    """What was exported.

    Attributes:
        source, output: the checkpoint and the folder that was written.
        step: optimizer steps that the model was trained for.
        dtype: of the parameters.
        tensors, parameters, bytes: how many tensors (buffers included), numbers in parameters, bytes of all tensors.
        files: names of the safetensors files.
    """

    source: str
    output: str
    step: int
    dtype: str
    tensors: int
    parameters: int
    bytes: int
    files: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `export_safetensors`."""
    return (Path(folder) / DESCRIPTION).is_file()


def read_export(folder: Path) -> dict[str, Any]:
    """What scatterfold.json says: `config` (the groups that define the model), `tokenizer`, `step`, `dtype`.

    Raises: CheckpointError if it is damaged, or was written by a newer version.
    """
    file = Path(folder) / DESCRIPTION
    try:
        described = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{file} is damaged: it is not JSON") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        found = described.get("format") if isinstance(described, dict) else None
        raise CheckpointError(f"{file} has format {found!r}, this version reads format {FORMAT}")
    missing = [key for key in ("config", "tokenizer", "step") if key not in described]
    if missing:
        raise CheckpointError(f"{file} is damaged: it has no {missing[0]}")
    return described


def export_safetensors(
    source: Path, output: Path, max_shard_bytes: int = 5_000_000_000, dtype: str = "fp32"
) -> ExportReceipt:
    """Write the model of a checkpoint as one folder of safetensors files.

    One file's tensors are in memory at a time. The folder appears under its name when it is whole.

    Args:
        source: a run folder (its newest whole checkpoint is taken) or one of its checkpoints.
        output: a folder that is empty or does not exist yet.
        max_shard_bytes: of tensors in one file; a tensor that is larger has a file of its own.
        dtype: fp32 or bf16, of the parameters; buffers, such as the expert bias, keep theirs.

    Raises: CheckpointError if there is no whole checkpoint or its tensors are not those of its model; DataError if
        its tokenizer's file is gone; ConfigError if the output holds something or cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is unknown, allowed: {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes} is too small, allowed: 1 or more")
    output = Path(output).expanduser()
    check_new(output)
    checkpoint = find_checkpoint(Path(source).expanduser())
    meta = read_meta(checkpoint)
    if not {"config", "tokenizer"} <= meta.keys():
        raise CheckpointError(f"{checkpoint} does not say which model it holds, allowed: a checkpoint of a run")
    tokenizer = tokenizer_from(meta["tokenizer"], checkpoint.parent.parent)
    plan = ModelPlan.from_config(meta["config"], tokenizer.vocab_size)
    with torch.device("meta"):
        model = plan.make_model()
    state = model_state(model)
    check_fits(checkpoint, state)
    tensors = WholeTensors(checkpoint)
    parameters = {f"{MODEL}{name}" for name, _ in model.named_parameters()}
    dtypes = {name: DTYPES[dtype] if name in parameters else tensors.empty(name, "meta").dtype for name in state}
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in state.items()}
    files = split_files(sizes, max_shard_bytes)
    with new_folder(output) as folder:
        _check_space(folder, output, sum(sizes.values()))
        for file, names in files.items():
            _save({name.removeprefix(MODEL): tensors[name].to(dtypes[name]) for name in names}, folder / file)
        if len(files) > 1:
            weight_map = {name.removeprefix(MODEL): file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_json(folder / WEIGHTS_INDEX, index)
        tokenizer.save(folder)
        _write_json(folder / DESCRIPTION, _describe(meta, plan, tokenizer, dtype))
    return ExportReceipt(
        source=str(checkpoint),
        output=str(output),
        step=meta["step"],
        dtype=dtype,
        tensors=len(sizes),
        parameters=sum(state[name].numel() for name in parameters if name in state),
        bytes=sum(sizes.values()),
        files=tuple(files),
    )


def split_files(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """Names of tensors by file, in their order: a file is full when the next tensor would take it over `most` bytes."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    stem = WEIGHTS.removesuffix(".safetensors")
    return {f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards)}


def _describe(meta: Mapping[str, Any], plan: ModelPlan, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    config = {group: meta["config"][group] for group in MODEL_GROUPS}
    config["model"] = {**config["model"], "vocab_size": plan.config.vocab_size}
    spec = dict(tokenizer.spec())
    if "path" in spec:
        spec["path"] = Path(spec["path"]).name  # its copy is in the folder
    return {"format": FORMAT, "step": meta["step"], "dtype": dtype, "tokenizer": spec, "config": config}


def _check_space(folder: Path, output: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"output={output} needs {needed:,} bytes and its disk has {free:,}, allowed: a disk with space left"
        )


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """Raises OSError as any writing does: the library puts the system's error number into a text."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
