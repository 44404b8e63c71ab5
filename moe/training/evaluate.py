"""Evaluation: cross-entropy, perplexity and bits per byte on the validation text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...parallel.engines.base import Engine
from ..context import StepContext
from ..data.batches import Batch


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation, over all ranks.

    Attributes:
        loss: mean cross-entropy per target token, in nats, without auxiliary losses.
        bits_per_byte: total cross-entropy in bits over the bytes of text that the targets stand for, so that models
            with different tokenizers compare.
        tokens, num_bytes: what it was measured on.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def record(self) -> dict[str, float]:
        """The evaluation as a line of metrics.jsonl; `valid_tokens` tells which lines may be compared."""
        return {
            "valid_loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "valid_tokens": self.tokens,
        }


def evaluate(
    engine: Engine,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor],
    counts: bool = True,
) -> Evaluation:
    """Measure the model on this rank's share of the batches and sum over ranks.

    Every rank must be given the same number of batches (sharded models communicate in forward); a rank that has no
    more text gets batches whose labels are all masked.

    Args:
        counts: whether this rank counts the tokens and bytes of its batches: one of those that read the same.
    """
    was_training = [part.training for part in engine.parts]
    for part in engine.parts:
        part.eval()
    total_loss = torch.zeros((), dtype=torch.float64, device=device)  # stays on the device: no waiting for each batch
    num_targets = num_bytes = 0
    for batch in batches:
        context = StepContext(num_sequences=batch.tokens.shape[0])
        total_loss += engine.evaluate({**batch.arguments(device), "context": context})
        num_targets += batch.num_targets if counts else 0
        num_bytes += batch.num_bytes if counts else 0
    for part, mode in zip(engine.parts, was_training):
        part.train(mode)
    counted = torch.tensor([num_targets, num_bytes], dtype=torch.float64, device=device)
    loss_sum, tokens, num_bytes = sum_over_ranks(torch.cat([total_loss[None], counted])).tolist()
    return Evaluation(
        loss=loss_sum / max(tokens, 1.0),
        bits_per_byte=loss_sum / math.log(2.0) / max(num_bytes, 1.0),
        tokens=int(tokens),
        num_bytes=int(num_bytes),
    )
