"""What an upcycling will make and cost, before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..build import ModelPlan
from ..interop.stored import StoredModel
from .convert import method_of
from .settings import UpcycleSettings

SEQUENCE = 4096  # tokens of a sequence, for the attention term of the FLOPs, where the model reads as many
BYTES_TRAINED, BYTES_FROZEN = 16, 4


@dataclass(frozen=True)
class Size:
    """One model in numbers.

    Attributes:
        parameters, active, trained: all; those that one token uses; those that get gradients.
        flops_per_token: of forward and backward pass, in a sequence of `sequence` tokens.
        sequence: tokens.
    """

    parameters: int
    active: int
    trained: int
    flops_per_token: float
    sequence: int

    @classmethod
    def of(cls, plan: ModelPlan) -> Size:
        sequence = min(SEQUENCE, plan.config.max_positions)
        counts = plan.counts(sequence)
        with torch.device("meta"):
            trained = sum(p.numel() for p in plan.make_model().parameters() if p.requires_grad)
        return cls(counts.total, counts.active, trained, counts.flops_per_token, sequence)

    def training_bytes(self, gpus: int) -> float:
        """Bytes on each of `gpus` GPUs, evenly sharded: 16 a trained parameter (4 for it, 4 for its gradient, 8 for
        Adam's moments, all float32), 4 a frozen one. Activations come on top."""
        frozen = self.parameters - self.trained
        return (BYTES_TRAINED * self.trained + BYTES_FROZEN * frozen) / gpus


@dataclass(frozen=True)
class UpcyclePlan:
    """What will be made of what.

    Attributes:
        sources: folders.
        to, architecture: format of the result, and of Hugging Face its model_type.
        method: and all settings of the conversion.
        layers, moe_layers: how many the model has, and which become MoE layers.
        before, after: sizes.
        gpus, training_bytes: on each of so many GPUs, see `Size.training_bytes`.
        output_bytes: of all tensors of the result.
        exact, why: whether the result computes what the source does, by construction.
    """

    sources: tuple[str, ...]
    to: str
    architecture: str | None
    method: str
    settings: UpcycleSettings
    layers: int
    moe_layers: tuple[int, ...]
    before: Size
    after: Size
    gpus: int
    training_bytes: float
    output_bytes: int
    exact: bool
    why: str

    def record(self) -> dict[str, Any]:
        return asdict(self)


def plan_upcycle(
    sources: Sequence[StoredModel],
    settings: UpcycleSettings,
    result: StoredModel,
    to: str,
    architecture: str | None = None,
    gpus: int = 8,
) -> UpcyclePlan:
    """Describe what `upcycle(sources, settings)` returned as `result`, without reading a tensor."""
    method, plan = method_of(sources, settings), result.plan()
    promise, after = method.promise(), Size.of(plan)
    return UpcyclePlan(
        sources=tuple(str(source.source) for source in sources),
        to=to,
        architecture=architecture,
        method=settings.method,
        settings=settings,
        layers=plan.config.layers,
        moe_layers=tuple(plan.moe_layers),
        before=Size.of(sources[0].plan()),
        after=after,
        gpus=gpus,
        training_bytes=after.training_bytes(gpus),
        output_bytes=sum(tensor.bytes for tensor in result.tensors.values()),
        exact=promise.exact,
        why=promise.why,
    )
