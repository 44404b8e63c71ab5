"""What surgery did to a model: counted, and measured on what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..interop.stored import StoredModel
from .mixture import Mixture


@dataclass(frozen=True)
class Sizes:
    """Figures of one model.

    Attributes:
        experts: of a MoE layer; 1 for a dense model.
        experts_per_token: upper bound.
        parameters, active: all, and those that one token uses.
        flops_per_token: forward and backward, at the longest sequence.
    """

    experts: int
    experts_per_token: int
    parameters: int
    active: int
    flops_per_token: float

    @classmethod
    def of(cls, stored: StoredModel) -> Sizes:
        plan = stored.plan()
        counts = plan.counts()
        taken = Mixture.of(stored).experts_per_token if plan.is_moe else 1
        experts = plan.config.num_experts if plan.is_moe else 1
        return cls(experts, taken, counts.total, counts.active, counts.flops_per_token)


@dataclass(frozen=True)
class Measured:
    """Both models run on the same tokens, in float32, the result as it lies in its folder.

    Attributes:
        probe: what the logits were compared on, and how many tokens.
        largest_difference: absolute, of logits.
        relative_difference: of that to the largest absolute logit of the source.
        loss: before and after, nats per token on the end of the corpus; None without a corpus.
    """

    probe: str
    largest_difference: float
    relative_difference: float
    loss: tuple[float, float] | None


@dataclass(frozen=True)
class SurgeryReceipt:
    """The whole story.

    Attributes:
        operation, source, output: what was done to which folder; an output of None for a dry run.
        format: in which it was read, and in which it is written.
        before, after: sizes.
        layers: by layer, of which old experts each new one is made; empty where a dry run does not know.
        usage: by layer, the share of the assignments that each old expert had on the corpus; empty without one.
        corpus: its name and how many tokens were counted; None without one.
        notes: sentences.
        measured: None for a dry run.
    """

    operation: str
    source: str
    output: str | None
    format: tuple[str, str]
    before: Sizes
    after: Sizes
    layers: Mapping[int, Sequence[Sequence[int]]]
    usage: Mapping[int, Sequence[float]]
    corpus: tuple[str, int] | None
    notes: tuple[str, ...]
    measured: Measured | None

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)
