"""`scatterfold experts`: fewer, merged or more experts in a trained mixture.

Works as `scatterfold experts`, `python -m scatterfold.tools.experts` and `torchrun -m scatterfold.tools.experts`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .arguments import argument
from .subcommands import on_all_ranks, run_subcommand

if TYPE_CHECKING:
    from ..moe.surgery import Operation, SurgeryReceipt

HELP = """Change the experts of a trained mixture, in any format; the result is written in the format that was read.

  prune    keep the experts that a text uses most, or those that are named; keep=1 makes the model dense
  merge    let experts that are alike become one, their mean by use
  grow     add copies of experts, so that the model goes on to compute what it did where that is possible

Example:
  scatterfold experts prune source=runs/demo output=models/pruned keep=4 data=books/"""

DATA = "text whose experts count: file, folder, indexed dataset, or stdlib"


@dataclass(frozen=True, kw_only=True)
class _Folders:
    """What all operations take."""

    source: Path = argument("folder of the model")
    output: Path | None = argument("folder to write, empty or not there yet; not needed with dry_run", default=None)
    data: str | None = argument(DATA, default=None)
    tokens: int = argument("of the text at most, to count use, and again for the loss", default=65_536, least=2)
    pack_documents: bool = argument("documents in one sequence do not see each other", default=True)
    top_k: int | None = argument("experts per token of the result; null: see above", default=None, least=1)
    device: str = argument("to run the models on, layer by layer", default="auto", choices=("auto", "cpu", "cuda"))
    architecture: str | None = argument("of a Hugging Face folder, its model_type; null: what fits", default=None)
    dtype: str | None = argument(
        "of the parameters; null: as in the source", default=None, choices=("fp32", "bf16", "fp16")
    )
    max_shard_bytes: int = argument("most bytes of tensors in one file", default=5_000_000_000, least=1)
    dry_run: bool = argument("only check, and print the sizes before and after", default=False)
    json: Path | None = argument("also write the receipt to this file", default=None)


@dataclass(frozen=True, kw_only=True)
class Prune(_Folders):
    """Keep some experts of each layer, and their rows of the router.

    Either keep=N, the N experts of each layer that the text uses most, or experts=[0,3], the same in every layer. One
    expert becomes a dense MLP. Experts per token stay as they are, or become all that are left.
    """

    EXAMPLE: ClassVar[str] = "scatterfold experts prune source=runs/demo output=models/pruned keep=4 data=books/"

    keep: int | None = argument("experts of each layer", default=None, least=1)
    experts: tuple[int, ...] = argument("ids to keep, instead of keep", default=())
    criterion: str = argument(
        "weighted_frequency (frequency times weight), frequency (share of the assignments) or weight (share of the "
        "combine weights)",
        default="weighted_frequency",
    )


@dataclass(frozen=True, kw_only=True)
class Merge(_Folders):
    """Let groups of experts become one each: the mean of their weights and of their rows of the router, by use.

    Without a text all experts count alike. Experts per token stay as they are, or become all that are left.
    """

    EXAMPLE: ClassVar[str] = "scatterfold experts merge source=runs/demo output=models/merged experts=4 data=books/"

    experts: int = argument("of each layer in the result", least=1)
    by: str = argument("how alike experts are: router (their rows), weights, outputs (on the text)", default="router")
    grouping: str | None = argument(
        "dominant (the most used lead a group each) or hierarchical (average linkage); null: dominant by=router with a "
        "text, else hierarchical",
        default=None,
    )
    align: bool = argument("bring the neurons of merged experts into one order first", default=False)


@dataclass(frozen=True, kw_only=True)
class Grow(_Folders):
    """Add copies of experts.

    A multiple of the experts copies all as often, and experts per token grow as much unless top_k says otherwise: the
    model computes what it did. Another number copies the experts that the text uses most, and the result differs.
    """

    EXAMPLE: ClassVar[str] = "scatterfold experts grow source=runs/demo output=models/grown experts=16"

    experts: int = argument("of each layer in the result", least=1)
    noise: float = argument("on the second matrix of copies, relative; adds up to zero over the copies", default=0.01)
    router_noise: float = argument("on the router's rows of copies, relative; changes the model", default=0.0)
    seed: int = argument("of the noise", default=0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    commands = {"prune": (Prune, _run), "merge": (Merge, _run), "grow": (Grow, _run)}
    return run_subcommand("experts", HELP, commands, argv)


def _run(settings: Prune | Merge | Grow) -> int:
    import torch

    from ..kernels.errors import ConfigError
    from ..moe.surgery import Job, operate
    from .files import check_target, write_atomically

    check_target(settings.json)
    if settings.output is None and not settings.dry_run:
        raise ConfigError("output is missing, allowed: output=DIR, folder to write, or dry_run=true")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    names = ("dtype", "max_shard_bytes", "architecture")
    options = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    job = Job(
        source=settings.source,
        output=None if settings.dry_run else settings.output,
        data=settings.data,
        tokens=settings.tokens,
        pack_documents=settings.pack_documents,
        device=device,
        options=tuple(options.items()),
    )

    def command(is_main: bool) -> None:
        receipt = operate(job, _operation(settings), _tell if is_main else lambda line: None)
        if is_main:
            if settings.json is not None:
                write_atomically(settings.json, json.dumps(receipt.record(), indent=2) + "\n")
            _show(receipt)

    return on_all_ranks(command)


def _operation(settings: Prune | Merge | Grow) -> Operation:
    """What the arguments ask for."""
    from ..moe import surgery

    if isinstance(settings, Grow):
        noise = surgery.Noise(settings.noise, settings.router_noise, settings.seed)
        return surgery.Grow(settings.experts, noise, top_k=settings.top_k)
    kind = surgery.Prune if isinstance(settings, Prune) else surgery.Merge
    names = (field.name for field in dataclasses.fields(kind))
    return kind(**{name: getattr(settings, name) for name in names})


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(receipt: SurgeryReceipt) -> None:
    before, after, measured = receipt.before, receipt.after, receipt.measured
    rows = [
        ("source", f"{receipt.source}, {receipt.format[0]}"),
        ("output", "nothing, a dry run" if receipt.output is None else f"{receipt.output}, {receipt.format[1]}"),
        ("experts", f"{before.experts} -> {after.experts} per layer, {_words(receipt.operation)}"),
        ("per token", f"{before.experts_per_token} -> {after.experts_per_token} experts"),
        ("parameters", f"{before.parameters:,} -> {after.parameters:,}"),
        ("active", f"{before.active:,} -> {after.active:,} per token"),
        ("FLOPs", f"{before.flops_per_token:.3g} -> {after.flops_per_token:.3g} per token, forward and backward"),
    ]
    for layer, groups in receipt.layers.items():
        rows.append((f"layer {layer}", " ".join("+".join(map(str, group)) for group in groups)))
    if measured is not None:
        share = f"{measured.relative_difference:.1e} of the largest logit"
        rows.append(("difference", f"{measured.largest_difference:.2e} at most between logits, {share}"))
        rows.append(("probe", f"{measured.probe}, float32, the result as written"))
        if measured.loss is not None and receipt.corpus is not None:
            rows.append(("loss", f"{measured.loss[0]:.4f} -> {measured.loss[1]:.4f} on the end of {receipt.corpus[0]}"))
    if receipt.corpus is not None:
        rows.append(("use", f"counted on {receipt.corpus[1]:,} tokens of {receipt.corpus[0]}"))
    rows += [("note", note) for note in receipt.notes]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _words(operation: str) -> str:
    return {"prune": "the others pruned", "merge": "the others merged into them", "grow": "copies added"}[operation]


if __name__ == "__main__":
    sys.exit(main())
