"""`scatterfold upcycle`: a mixture of experts from a dense model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .arguments import argument
from .subcommands import on_all_ranks, run_command
from .upcycle_report import measured_rows, plan_rows, show, written_rows

if TYPE_CHECKING:
    from ..moe.upcycle import UpcycleSettings

DRY_RUN = "--dry-run"
FORMATS = ("scatterfold", "huggingface", "megatron")


@dataclass(frozen=True)
class Upcycle:
    """Make a mixture of experts from a dense model.

    Reads a run folder, a checkpoint, a folder of `scatterfold convert`, of Hugging Face or of Megatron-Core, and writes
    the format that it read. Nothing is held in memory but the file that is being written; under torchrun the ranks
    share the files, and the bytes are the same.
    """

    EXAMPLE: ClassVar[str] = "scatterfold upcycle source=models/qwen3 output=models/qwen3-moe experts=8 top_k=2"

    source: tuple[Path, ...] = argument("folder of the dense model, several as [A,B] for branch_train_mix")
    output: Path | None = argument("folder to write, empty or not there yet; not needed with dry_run", default=None)
    experts: int = argument("of each MoE layer", default=8)
    top_k: int = argument("experts per token; the upper bound of them for router=threshold", default=2)
    method: str = argument(
        "sparse, fine_grained, drop, noise, shared, adapter or branch_train_mix: see docs/upcycling.md",
        default="sparse",
    )
    layers: str = argument("which become MoE: all, every_other, last_half, or numbers from 0 as [1,3]", default="all")
    granularity: int = argument("experts that one dense MLP is cut into (fine_grained, shared)", default=1)
    shuffle: bool = argument("cut each copy differently (fine_grained, shared)", default=False)
    scale: str | None = argument(
        "where the experts' constant goes: up_down, down, output, cube_root; null: the first that is exact",
        default=None,
    )
    router: str = argument("top_k or threshold", default="top_k")
    score: str = argument("softmax or sigmoid", default="softmax")
    renormalise: bool | None = argument("weights of a token sum to one; null: if top_k > 1", default=None)
    threshold: float = argument("probability mass of router=threshold", default=0.5)
    router_std: float | None = argument(
        "of the router's rows; null: 0.02, or 1e-7 if weights are not renormalised", default=None
    )
    balance_micro_batch: float = argument("coefficient of the router's balance loss", default=0.01)
    z_loss: float = argument("coefficient of the loss on the size of its logits", default=0.001)
    share: float = argument("part of the neurons that change (drop, noise)", default=0.5)
    indices: str = argument("shared: the same neurons in all matrices of an expert; per_matrix", default="shared")
    noise_std: float = argument("relative to the matrix (noise)", default=1.0)
    shared_shards: int = argument("shards of the shared expert; 0: the whole dense MLP (shared)", default=0)
    shared_gate: bool = argument("gate the shared expert, as Qwen2-MoE (shared)", default=False)
    adapter_width: int = argument("hidden width of an adapter (adapter)", default=64)
    optimizer: str = argument("reset, or carry the moments of AdamW along", default="reset")
    seed: int = argument("of all that is drawn", default=0)
    dry_run: bool = argument("only print what would be made, also --dry-run", default=False)
    gpus: int = argument("to train the result on, for the memory of each", default=8, least=1)
    probe: bool = argument("compare the logits of source and result at the end", default=True)
    probe_tokens: int = argument("tokens to compare them on", default=256, least=1)
    to: str | None = argument("format; null: the one that was read", default=None, choices=FORMATS)
    architecture: str | None = argument("model_type for to=huggingface; null: the one that fits", default=None)
    dtype: str | None = argument("fp32, bf16 or fp16, of the parameters; null: as they are", default=None)
    max_shard_bytes: int = argument("most bytes of tensors in one file", default=5_000_000_000, least=1)
    json: Path | None = argument("also write the receipt to this file", default=None)

    def conversion(self) -> UpcycleSettings:
        """The part that says what to make."""
        from dataclasses import fields, replace

        from ..moe.upcycle import UpcycleSettings

        names = (field.name for field in fields(UpcycleSettings))
        settings = UpcycleSettings(**{name: getattr(self, name) for name in names if name != "layers"})
        return replace(settings, layers=_layers(self.layers))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(Upcycle, _run, ["dry_run=true" if word == DRY_RUN else word for word in words])


def _run(settings: Upcycle) -> int:
    from ..kernels import ConfigError
    from ..moe.interop.folder import check_new
    from ..moe.interop.open import open_model
    from ..moe.interop.write import write_model
    from ..moe.upcycle import architecture_of, measure, plan_upcycle, target_of, upcycle
    from .files import check_target, write_atomically

    check_target(settings.json)
    conversion = settings.conversion()
    if settings.output is None and not settings.dry_run:
        raise ConfigError("output is missing, allowed: output=DIR, folder to write, or dry_run=true")

    def command(is_main: bool) -> None:
        sources = [open_model(source) for source in settings.source]
        result = upcycle(sources, conversion)
        to = target_of(sources[0], settings.to)
        architecture = architecture_of(result, to, settings.architecture)
        plan = plan_upcycle(sources, conversion, result, to, architecture, settings.gpus)
        record, rows = {"plan": plan.record()}, plan_rows(plan)
        if settings.output is not None:
            check_new(settings.output)
        if settings.output is not None and not settings.dry_run:
            options = {} if architecture is None else {"architecture": architecture}
            written = write_model(result, settings.output, to, settings.dtype, settings.max_shard_bytes, **options)
            record["written"] = written.record()
            rows += written_rows(written)
            made = open_model(settings.output)  # as it is on the disk, which shows that it can be read
            if is_main and settings.probe:
                measured = measure(sources, made, settings.probe_tokens)
                record["measured"] = measured.record()
                rows += measured_rows(measured, plan, written)
        if is_main:
            if settings.json is not None:
                write_atomically(settings.json, json.dumps(record, indent=2) + "\n")
            show(rows)

    return on_all_ranks(command)


def _layers(text: str) -> str | tuple[int, ...]:
    """`[1,3]` as numbers; a name as it is."""
    words = text.removeprefix("[").removesuffix("]").split(",")
    numbers = tuple(int(word) for word in words if word.strip().isdigit())
    return numbers if len(numbers) == len(words) else text


if __name__ == "__main__":
    sys.exit(main())
