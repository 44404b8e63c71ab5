"""`scatterfold convert`: a trained model in another format."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .arguments import argument
from .subcommands import run_command

if TYPE_CHECKING:
    from ..moe.interop.safetensors import ExportReceipt


def _to_safetensors(settings: Convert) -> ExportReceipt:
    from ..moe.interop.safetensors import export_safetensors

    return export_safetensors(settings.source, settings.output, settings.max_shard_bytes, settings.dtype)


TARGETS = {"safetensors": _to_safetensors}


@dataclass(frozen=True)
class Convert:
    """Write a trained model in another format, from a checkpoint of any layout.

    to=safetensors: one folder with the whole model under Scatterfold's own names (model.safetensors, or several files
    and an index), scatterfold.json and the tokenizer. `scatterfold sample source=` and `init_from=` read it.
    """

    EXAMPLE: ClassVar[str] = "scatterfold convert source=runs/demo output=exports/demo to=safetensors dtype=bf16"

    source: Path = argument("run folder, or one of its checkpoints")
    output: Path = argument("folder to write, empty or not there yet")
    to: str = argument("format", choices=tuple(TARGETS))
    max_shard_bytes: int = argument("most bytes of tensors in one file", default=5_000_000_000, least=1)
    dtype: str = argument("of the parameters; buffers keep theirs", default="fp32", choices=("fp32", "bf16"))
    json: Path | None = argument("also write the receipt to this file", default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(Convert, _run, argv)


def _run(settings: Convert) -> int:
    from .files import check_target, write_atomically

    check_target(settings.json)
    receipt = TARGETS[settings.to](settings)
    if settings.json is not None:
        write_atomically(settings.json, json.dumps(receipt.record(), indent=2) + "\n")
    _show(receipt)
    return 0


def _show(receipt: ExportReceipt) -> None:
    files = f"{len(receipt.files):,} files" if len(receipt.files) > 1 else "".join(receipt.files)
    rows = [
        ("source", f"{receipt.source}, step {receipt.step:,}"),
        ("output", f"{receipt.output}, {files}"),
        ("parameters", f"{receipt.parameters:,} ({receipt.dtype})"),
        ("tensors", f"{receipt.tensors:,}, {receipt.bytes:,} bytes"),
    ]
    for name, value in rows:
        print(f"{name:<10}  {value}")


if __name__ == "__main__":
    sys.exit(main())
