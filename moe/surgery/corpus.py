"""The text that experts are judged by: most of it counts their use, its end measures the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels import CheckpointError, DataError
from ..data.batches import Batch, BatchMaker, ValidBatches
from ..data.corpus import TokenSpan
from ..data.open import open_tokens
from ..data.settings import DataSettings
from ..interop.probe import run_layers
from ..interop.stored import StoredModel

ROWS = 4  # sequences of one batch
LONGEST = 512  # tokens of a sequence
VALIDATION = 20  # one in so many tokens, the last ones, measures the loss


@dataclass(frozen=True)
class Corpus:
    """Batches of a text.

    Attributes:
        name: file, folder or prefix.
        used: sequences spread evenly over the text but its end; every token is text.
        valid: sequences spread evenly over its end.
    """

    name: str
    used: tuple[Batch, ...]
    valid: tuple[Batch, ...]

    def used_arguments(self, device: torch.device) -> list[dict[str, Any]]:
        """What the model's forward pass gets; with labels, so that it returns a number and no logits."""
        return [batch.arguments(device) for batch in self.used]

    @property
    def used_tokens(self) -> int:
        return sum(batch.tokens.numel() for batch in self.used)

    @property
    def valid_targets(self) -> int:
        return sum(batch.num_targets for batch in self.valid)


def open_corpus(stored: StoredModel, path: str, tokens: int, pack_documents: bool = True) -> Corpus:
    """Read as much of a text as is asked for, in the tokens of a model.

    Args:
        path: a file or folder of raw text, which is prepared on first use, the prefix of an indexed dataset, or stdlib.
        tokens: at most, of each of the two parts.
        pack_documents: documents in one sequence do not see each other.

    Raises: CheckpointError if the model has no tokenizer; DataError if the text is missing, does not fit the
        tokenizer or is too short.
    """
    tokenizer = stored.tokenizer
    if tokenizer is None:
        raise CheckpointError(f"{stored.source} has no tokenizer to read data={path}, allowed: a folder with one")
    spec = tokenizer.spec()
    settings = DataSettings(path=path, tokenizer=str(spec.get("path", "bytes")), eod=spec.get("eod"))
    text = open_tokens(settings, tokenizer)
    longest = min(LONGEST, stored.plan().config.max_positions)
    length = min(longest, len(text) // 2)
    if length < 2:
        raise DataError(f"data={path} holds {len(text)} tokens, allowed: 4 or more")
    start_of_end = len(text) - max(length, len(text) // VALIDATION)
    make = BatchMaker(tokenizer.eod, tokenizer.byte_lengths, pack_documents)
    whole_rows = start_of_end // length * length
    return Corpus(
        name=path,
        used=tuple(_batches(text, 0, whole_rows, length, tokens, make)),
        valid=tuple(_batches(text, start_of_end, len(text), length, tokens, make)),
    )


def loss_of(stored: StoredModel, corpus: Corpus, device: torch.device | str = "cpu") -> float:
    """Mean cross-entropy of the end of the text, nats per token, run layer by layer in float32."""
    device = torch.device(device)
    losses = run_layers(stored, [batch.arguments(device) for batch in corpus.valid], device)
    return sum(float(loss) for loss in losses) / max(corpus.valid_targets, 1)


def _batches(text: TokenSpan, start: int, stop: int, length: int, tokens: int, make: BatchMaker) -> Iterator[Batch]:
    rows = -(-(stop - start) // length)
    rows = max(1, min(rows, tokens // length))
    of_batch = min(ROWS, rows)
    read = ValidBatches(lambda a, b: text.read(start + a, start + b), stop - start, length, of_batch, make)
    return read(rows // of_batch)
