"""How much each expert is used on a corpus: what pruning and merging go by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import ConfigError
from ..interop.probe import run_layers
from ..interop.stored import StoredModel
from ..models.transformer import Transformer
from ..routers.output import RouterOutput

CRITERIA = ("weighted_frequency", "frequency", "weight")


@dataclass(frozen=True)
class Usage:
    """What the routers did with the tokens of a corpus, in evaluation mode.

    Attributes:
        layers: numbers of the MoE layers, one per row of what follows.
        hits: (L, E) float64, tokens that each expert got.
        weight: (L, E) float64, sum of their combine weights.
        tokens: how many there were.
    """

    layers: tuple[int, ...]
    hits: Tensor
    weight: Tensor
    tokens: int

    def scores(self, criterion: str) -> dict[int, Tensor]:
        """By layer, (E,) shares that sum to one; zeros where nothing was routed.

        frequency is the share of the assignments, weight that of the combine weights, weighted_frequency the product of
        both, normalised again (after the gate weight times hit rate of 2206.00277, section 3).

        Raises: ConfigError for an unknown criterion.
        """
        if criterion not in CRITERIA:
            raise ConfigError(f"criterion={criterion} is unknown, allowed: {', '.join(CRITERIA)}")
        frequency, weight = _shares(self.hits), _shares(self.weight)
        chosen = {"frequency": frequency, "weight": weight}.get(criterion)
        return dict(zip(self.layers, _shares(frequency * weight) if chosen is None else chosen))

    def mean_weight(self, layer: int, expert: int) -> float:
        """Mean combine weight of an expert over its tokens.

        Raises: ConfigError if it has none.
        """
        row = self.layers.index(layer)
        hits = float(self.hits[row, expert])
        if hits == 0:
            raise ConfigError(
                f"expert {expert} of layer {layer} gets none of the {self.tokens:,} tokens, so its mean weight is "
                "unknown, allowed: an expert that is used, or more tokens"
            )
        return float(self.weight[row, expert]) / hits


def measure_usage(
    stored: StoredModel, batches: Sequence[Mapping[str, Any]], device: torch.device | str = "cpu"
) -> Usage:
    """Run the model layer by layer and count what its routers decide.

    Args:
        batches: arguments of the model's forward pass, every token of which counts.

    Raises: CheckpointError if a tensor cannot be read.
    """
    plan = stored.plan()
    shape = len(plan.moe_layers), plan.config.num_experts
    hits, weight = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    rows = {layer: row for row, layer in enumerate(plan.moe_layers)}

    def count(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: RouterOutput) -> None:
            routing = output.routing
            counts = routing.counts.cpu().long()
            used = routing.weight[: int(routing.expert_offsets[-1])].double().cpu()
            expert = torch.arange(counts.numel()).repeat_interleave(counts)
            hits[rows[layer]] += counts
            weight[rows[layer]].index_add_(0, expert, used)

        return hook

    @contextmanager
    def watch(part: Transformer) -> Iterator[None]:
        hooks = [moe.router.register_forward_hook(count(layer)) for layer, moe in part.moe_layers()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    run_layers(stored, batches, device, watch)
    tokens = sum(batch["tokens"].numel() for batch in batches)
    return Usage(tuple(plan.moe_layers), hits, weight, tokens)


def _shares(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True).clamp_min(1e-300)
