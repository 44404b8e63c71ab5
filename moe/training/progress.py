"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint.

    Attributes:
        step: optimizer steps done; the next one has this number, counting from 0.
        samples: sequences consumed, the position in the data.
        tokens: tokens consumed.
        seconds: time spent in steps.
        skipped, skipped_in_a_row: steps that were skipped because a value was not finite, in all and lately.
        evaluated_step: the last step after which the model was evaluated.
        best_valid_loss: lowest validation loss so far.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated_step: int | None = None
    best_valid_loss: float | None = None
