"""The receipt: how far the logits of the result are from those of its source, on a probe batch."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..interop.probe import run_layers
from ..interop.stored import StoredModel
from ..models.transformer import Transformer
from ..routers.output import RouterOutput

TOLERANCE = 1e-5  # of the largest logit: what rounding leaves in float32


@dataclass(frozen=True)
class Difference:
    """One source beside the result, both in float32.

    Attributes:
        source: folder.
        largest: absolute difference of logits.
        relative: of that to the source's largest absolute logit.
        loss: of the source on the probe, nats per token; None if the probe is no text.
    """

    source: str
    largest: float
    relative: float
    loss: float | None


@dataclass(frozen=True)
class Measured:
    """The result, as it was written, on the probe.

    Attributes:
        probe: text (the source of a module of the standard library) or random ids, where there is no tokenizer.
        tokens: how many.
        sources: differences from each.
        loss: nats per token; None if the probe is no text.
        experts_per_token: mean over tokens and MoE layers.
        busiest: largest load of an expert over the mean load of its layer, in the layer where that is largest.
    """

    probe: str
    tokens: int
    sources: tuple[Difference, ...]
    loss: float | None
    experts_per_token: float
    busiest: float

    @property
    def exact(self) -> bool:
        return all(difference.relative <= TOLERANCE for difference in self.sources)

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "exact": self.exact}


def measure(sources: Sequence[StoredModel], result: StoredModel, tokens: int = 256, seed: int = 0) -> Measured:
    """Run each model, layer by layer, on the same tokens and compare.

    Args:
        sources, result: models of one vocabulary.
        tokens: of the probe; no more than the models read in one sequence.
        seed: of random ids.

    Raises: CheckpointError if a tensor cannot be read.
    """
    kind, ids = probe_of(sources[0], tokens, seed)
    loads: list[Tensor] = []

    @contextmanager
    def watch(part: Transformer) -> Iterator[None]:
        hooks = [layer.router.register_forward_hook(_counting(loads)) for _, layer in part.moe_layers()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    made = run_layers(result, [{"tokens": ids}], watch=watch)[0]
    differences = []
    for source in sources:
        logits = run_layers(source, [{"tokens": ids}])[0]
        largest = float((made - logits).abs().max())
        relative = largest / max(float(logits.abs().max()), 1e-30)
        differences.append(Difference(str(source.source), largest, relative, _loss(logits, ids, kind)))
    return Measured(
        probe=kind,
        tokens=ids.numel(),
        sources=tuple(differences),
        loss=_loss(made, ids, kind),
        experts_per_token=sum(float(load.sum()) for load in loads) / (ids.numel() * len(loads)),
        busiest=max(float(load.max() / load.mean()) for load in loads),
    )


def probe_of(stored: StoredModel, tokens: int, seed: int) -> tuple[str, Tensor]:
    """What the probe is, and its ids (1, S)."""
    config = stored.plan().config
    length = min(tokens, config.max_positions)
    if stored.tokenizer is not None and stored.tokenizer.vocab_size <= config.vocab_size:
        text = Path(heapq.__file__).read_text(encoding="utf-8")
        ids = [stored.tokenizer.eod, *stored.tokenizer.encode(text)][:length]
        return "text", torch.tensor(ids)[None]
    generator = torch.Generator().manual_seed(seed)
    return "random ids", torch.randint(config.vocab_size, (1, length), generator=generator)


def _counting(loads: list[Tensor]) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: RouterOutput) -> None:
        loads.append(output.counts.double())

    return hook


def _loss(logits: Tensor, ids: Tensor, kind: str) -> float | None:
    if kind != "text" or ids.shape[1] < 2:
        return None
    return float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
