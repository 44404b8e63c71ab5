"""`scatterfold convert`: a model in another format.

Works as `scatterfold convert`, `python -m scatterfold.tools.convert` and `torchrun -m scatterfold.tools.convert`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .arguments import argument
from .subcommands import on_all_ranks, run_command

if TYPE_CHECKING:
    from ..moe.interop import WriteReceipt


@dataclass(frozen=True)
class Convert:
    """Write a model in another format.

    The source is a run folder, one of its checkpoints, or a folder in one of the formats; it is told by its content.
    to=huggingface: what transformers, vLLM and SGLang read. to=megatron: a distributed checkpoint of Megatron-Core.
    to=scatterfold: safetensors files under Scatterfold's own names, scatterfold.json and the tokenizer.
    Under torchrun the ranks share the work.
    """

    EXAMPLE: ClassVar[str] = "scatterfold convert source=runs/demo output=exports/demo to=huggingface dtype=bf16"

    source: Path = argument("folder of the model")
    output: Path = argument("folder to write, empty or not there yet")
    to: str = argument("format", choices=("huggingface", "megatron", "scatterfold"))
    dtype: str | None = argument(
        "of the parameters, nothing: as in the source; buffers keep theirs",
        default=None,
        choices=("fp32", "bf16", "fp16"),
    )
    max_shard_bytes: int = argument("most bytes of tensors in one file", default=5_000_000_000, least=1)
    architecture: str | None = argument("for huggingface: model_type, nothing: the first that fits", default=None)
    fused: bool = argument("for huggingface: experts stacked in one tensor instead of a key each", default=False)
    stacked: bool = argument("for megatron: layers stacked in one tensor instead of keys for each", default=False)
    optimizer: bool = argument("for scatterfold: also what the optimizer remembers", default=False)
    describe: Path | None = argument("for a Megatron source that does not say it: YAML file of its shape", default=None)
    json: Path | None = argument("also write the receipt to this file", default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(Convert, _run, argv)


def _run(settings: Convert) -> int:
    from .files import check_target, write_atomically

    def command(is_main: bool) -> None:
        receipt = _convert(settings)
        if is_main:
            if settings.json is not None:
                write_atomically(settings.json, json.dumps(receipt.record(), indent=2) + "\n")
            _show(receipt)

    check_target(settings.json)
    return on_all_ranks(command)


def _convert(settings: Convert) -> WriteReceipt:
    from dataclasses import replace

    from ..kernels.errors import ConfigError
    from ..moe.interop import write_model
    from ..moe.interop.folder import check_new
    from ..moe.interop.open import open_source
    from ..parallel.process import together

    together(lambda: check_new(settings.output.expanduser()))  # before checksums are compared
    if settings.optimizer and settings.to != "scatterfold":
        raise ConfigError(f"optimizer=true does not go with to={settings.to}, allowed: false, or to=scatterfold")
    stored = open_source(settings.source, "source", describe=settings.describe)
    if settings.optimizer and not stored.optimizer:
        raise ConfigError(f"optimizer=true, but {stored.source} holds no state of an optimizer, allowed: false")
    if not settings.optimizer:
        stored = replace(stored, optimizer={})
    options: dict[str, Any] = {
        "architecture": settings.architecture,
        "fused": settings.fused or None,
        "stacked": settings.stacked or None,
    }
    return write_model(
        stored,
        settings.output,
        settings.to,
        settings.dtype,
        settings.max_shard_bytes,
        **{name: value for name, value in options.items() if value is not None},
    )


def _show(receipt: WriteReceipt) -> None:
    files = f"{len(receipt.files):,} files" if len(receipt.files) > 1 else "".join(receipt.files)
    rows = [
        ("source", f"{receipt.source}, {receipt.format}, step {receipt.step:,}"),
        ("output", f"{receipt.output}, {receipt.to}, {files}"),
        ("parameters", f"{receipt.parameters:,} ({receipt.dtype})"),
        ("tensors", f"{receipt.tensors:,}, {receipt.bytes:,} bytes"),
    ]
    if receipt.optimizer:
        rows.append(("optimizer", "its state is there too"))
    for name, value in rows:
        print(f"{name:<10}  {value}")


if __name__ == "__main__":
    sys.exit(main())
