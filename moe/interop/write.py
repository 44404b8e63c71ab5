"""Write a model in any format, as one folder that is whole or not there, by one process or by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...kernels import ConfigError
from ...parallel.process import place, together
from .folder import check_new, check_space, new_folder, or_config_error
from .scatterfold import DTYPES, dtype_names, write_scatterfold
from .stored import StoredModel


@dataclass(frozen=True)
class WriteReceipt:
    """What was written.

    Attributes:
        source, format: the folder that the model came from, and how it was written there.
        output, to: the folder that was written, and its format.
        step: optimizer steps that the model was trained for.
        dtype: of the parameters.
        tensors, parameters, bytes: of the model under our own names: how many tensors (buffers included), numbers in
            parameters, bytes of all tensors.
        optimizer: whether the optimizer's state was written too.
        files: names of the files that hold tensors.
    """

    source: str
    format: str
    output: str
    to: str
    step: int
    dtype: str
    tensors: int
    parameters: int
    bytes: int
    optimizer: bool
    files: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def write_model(
    stored: StoredModel,
    output: str | Path,
    to: str = "scatterfold",
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    **options: Any,
) -> WriteReceipt:
    """Write a model as one folder. Among several ranks every one must call it; they share the files.

    The tensors of one file are in memory at a time, and the bytes do not depend on the number of ranks. The folder
    appears under its name when it is whole.

    Args:
        output: a folder that is empty or does not exist yet, on a disk that all ranks see.
        to: scatterfold, huggingface or megatron.
        dtype: fp32, bf16 or fp16, of the parameters; buffers, such as the expert bias, keep theirs. None: as they are.
        max_shard_bytes: of tensors in one file; a tensor that is larger has a file of its own.
        options: of one format only: `architecture` and `fused` of Hugging Face, `stacked` of Megatron.

    Raises, on every rank: ConfigError if an option does not fit, the format cannot hold the model, or the output holds
        something or cannot be written; CheckpointError if the source cannot be read. Nothing is left behind then.
    """
    output = Path(output).expanduser()
    write = together(lambda: _checked_writer(stored, output, to, dtype, max_shard_bytes, options))
    stored = _with_dtype(stored if to == "scatterfold" else replace(stored, optimizer={}), dtype)
    rank, world = place()
    size = sum(tensor.bytes for held in (stored.tensors, stored.optimizer) for tensor in held.values())

    with new_folder(output) as folder:
        together(lambda: check_space(folder, output, size) if rank == 0 else None)
        files = together(
            lambda: or_config_error(
                output, lambda: write(stored, folder, max_shard_bytes, rank=rank, world=world, **options)
            )
        )
    parameters = stored.parameters()
    return WriteReceipt(
        source=str(stored.source),
        format=stored.format,
        output=str(output),
        to=to,
        step=stored.step,
        dtype=dtype_names(stored),
        tensors=len(stored.tensors),
        parameters=sum(stored.tensors[name].shape.numel() for name in parameters),
        bytes=sum(tensor.bytes for tensor in stored.tensors.values()),
        optimizer=bool(stored.optimizer),
        files=tuple(files),
    )


Writer = Callable[..., tuple[str, ...]]


def _huggingface() -> Writer:
    from .huggingface import write_huggingface

    return write_huggingface


def _megatron() -> Writer:
    from .megatron import write_megatron

    return write_megatron


WRITERS: Mapping[str, Callable[[], Writer]] = {
    "scatterfold": lambda: write_scatterfold,
    "huggingface": _huggingface,
    "megatron": _megatron,
}
OPTIONS = {"scatterfold": (), "huggingface": ("architecture", "fused"), "megatron": ("stacked",)}


def _checked_writer(
    stored: StoredModel, output: Path, to: str, dtype: str | None, max_shard_bytes: int, options: Mapping[str, Any]
) -> Writer:
    """What writes the format, after checking all that can be known before any work."""
    check_request(stored.source, output, to, dtype, max_shard_bytes, **options)
    stored.checked()
    return WRITERS[to]()


def check_request(
    source: Path,
    output: Path,
    to: str = "scatterfold",
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    **options: Any,
) -> None:
    """Raises: ConfigError for what `write_model` would refuse whatever the model is, for those who work before."""
    if to not in WRITERS:
        raise ConfigError(f"to={to} is unknown, allowed: {', '.join(WRITERS)}")
    for name, value in options.items():
        if name not in OPTIONS[to]:
            allowed = ", ".join(OPTIONS[to]) or f"no option with to={to}"
            raise ConfigError(f"{name}={value} does not go with to={to}, allowed: {allowed}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is unknown, allowed: {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes} is too small, allowed: 1 or more")
    check_new(output)
    if output.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"output={output} lies in its source, {source}, allowed: a folder outside of it")


def _with_dtype(stored: StoredModel, dtype: str | None) -> StoredModel:
    if dtype is None:
        return stored
    parameters = stored.parameters()
    converted = {
        name: tensor.to(DTYPES[dtype]) if name in parameters else tensor for name, tensor in stored.tensors.items()
    }
    return replace(stored, tensors=converted)
