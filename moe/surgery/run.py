"""From a folder to a folder: check, measure, make, write, and measure again on what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...parallel.process import together
from ..interop.folder import check_new
from ..interop.open import open_model
from ..interop.probe import probe_tokens, run_layers
from ..interop.stored import StoredModel
from ..interop.write import check_request, write_model
from ..upcycle.target import architecture_of, target_of
from .corpus import Corpus, loss_of, open_corpus
from .mixture import Mixture
from .operations import Made, Operation
from .receipt import Measured, Sizes, SurgeryReceipt
from .usage import Usage, measure_usage


@dataclass(frozen=True)
class Job:
    """Where to read, where to write, and what to measure with.

    Attributes:
        source, output: folders; no output for a dry run.
        data: a text, None for none (see `corpus.open_corpus`).
        tokens: of it at most, for counting and again for the loss.
        pack_documents: as in training.
        device: to run the models on, one layer at a time.
        options: of `write_model`: dtype, max_shard_bytes, architecture.
    """

    source: Path
    output: Path | None
    data: str | None = None
    tokens: int = 65_536
    pack_documents: bool = True
    device: str = "cpu"
    options: tuple[tuple[str, Any], ...] = ()


def operate(job: Job, operation: Operation, tell: Callable[[str], None] = lambda line: None) -> SurgeryReceipt:
    """Change the experts of a model and write it in the format it was read in. Every rank must call it.

    Each rank runs the models by itself where they are to be run; the ranks share the files that are written.

    Args:
        tell: gets a line before each part that takes time.

    Raises: ConfigError, CheckpointError or DataError, on every rank, before anything is written.
    """
    output = None if job.output is None else job.output.expanduser()
    if output is not None:
        together(lambda: check_new(output))  # before checksums are compared
    stored = open_model(job.source)
    mixture = Mixture.of(stored)
    operation.check(mixture, job.data is not None)
    config, to = operation.config(mixture), target_of(stored, None)
    outline = stored.with_model(config, {})
    _check_writable(outline, to, dict(job.options).get("architecture"))
    if output is not None:
        check_request(stored.source, output, to, **dict(job.options))
    else:
        notes = ("a dry run: nothing was run or written",)
        return _receipt(job, operation, stored, outline, to, Made(outline, {}, notes), None, None, None)
    device = torch.device(job.device)
    corpus = usage = None
    if job.data is not None:
        corpus = together(lambda: open_corpus(stored, str(job.data), job.tokens, job.pack_documents))
        tell(f"counting the use of the experts on {corpus.used_tokens:,} tokens")
        usage = measure_usage(stored, corpus.used_arguments(device), device)
    made = operation.make(mixture, usage, corpus, device)
    tell(f"writing {output}")
    write_model(made.stored, output, to, **dict(job.options))
    tell("comparing source and result")
    measured = _measure(stored, open_model(output), corpus, device)
    return _receipt(job, operation, stored, made.stored, to, made, usage, corpus, measured)


def _check_writable(outline: StoredModel, to: str, architecture: str | None) -> None:
    """Raises: ConfigError, before any work, if the format cannot say what the result computes."""
    if architecture is not None:
        architecture_of(outline, to, architecture)
    elif to == "huggingface":
        from ..interop.huggingface import choose_architecture

        choose_architecture(outline.config, outline.origin.get("model_type"))


def _measure(before: StoredModel, after: StoredModel, corpus: Corpus | None, device: torch.device) -> Measured:
    if corpus is None:
        tokens, probe = probe_tokens(before), "random ids"
    else:
        tokens, probe = corpus.valid[0].tokens, corpus.name
    one, other = (run_layers(stored, [{"tokens": tokens.to(device)}], device)[0] for stored in (before, after))
    largest = float((one - other).abs().max())
    return Measured(
        probe=f"{tokens.numel()} tokens, {probe}",
        largest_difference=largest,
        relative_difference=largest / max(float(one.abs().max()), 1e-30),
        loss=None if corpus is None else (loss_of(before, corpus, device), loss_of(after, corpus, device)),
    )


def _receipt(
    job: Job,
    operation: Operation,
    before: StoredModel,
    after: StoredModel,
    to: str,
    made: Made,
    usage: Usage | None,
    corpus: Corpus | None,
    measured: Measured | None,
) -> SurgeryReceipt:
    shares = {} if usage is None else usage.scores("frequency")
    return SurgeryReceipt(
        operation=operation.name,
        source=str(before.source),
        output=None if job.output is None else str(job.output),
        format=(before.format, to),
        before=Sizes.of(before),
        after=Sizes.of(after),
        layers={layer: [list(group) for group in groups] for layer, groups in made.layers.items()},
        usage={layer: [round(share, 6) for share in row.tolist()] for layer, row in shares.items()},
        corpus=None if corpus is None else (corpus.name, corpus.used_tokens),
        notes=made.notes,
        measured=measured,
    )
