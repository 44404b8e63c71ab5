"""What the routers of a step did: load, balance, entropy and losses, per layer and over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..routers.output import RouterOutput


@dataclass(frozen=True)
class StepStatistics:
    """Router figures of one optimizer step, over all micro-batches and ranks.

    Attributes:
        layers: numbers of the MoE layers, one per row of what follows (L rows).
        counts: (L, E) float64 on the device, assignments before dropping.
        tokens: (L,) tokens routed.
        dropped: (L,) assignments that did not fit.
        entropy: (L,) mean entropy of the router's distribution, in nats.
        losses: by name, (L,) mean over the tokens, coefficients included.
    """

    layers: tuple[int, ...]
    counts: Tensor
    tokens: Tensor
    dropped: Tensor
    entropy: Tensor
    losses: dict[str, Tensor]

    def per_layer(self) -> list[dict[str, float | list[float]]]:
        """One record per MoE layer: `layer`, `load` (share of assignments per expert) and the figures of `summary`.

        Of one layer with counts c, in the definitions of loss-free balancing (2408.15664) and M6-T (2105.15082):
        max_violation is max(c) / mean(c) - 1 (0 if balanced), load_entropy the entropy of c / sum(c) over ln E, load_cv
        the population standard deviation of c over its mean, dead the number of experts without assignment,
        dropped_fraction over wanted assignments, router_entropy in nats, per_token the experts per token wanted.
        """
        columns = [self.tokens, self.dropped, self.entropy, *self.losses.values()]
        table = torch.cat([self.counts, torch.stack(columns, dim=1)], dim=1).tolist()  # the one host synchronisation
        num_experts = self.counts.shape[1]
        records: list[dict[str, float | list[float]]] = []
        for layer, row in zip(self.layers, table):
            counts, (tokens, dropped, entropy, *losses) = row[:num_experts], row[num_experts:]
            records.append(
                {
                    "layer": layer,
                    **_balance(counts),
                    "dropped_fraction": dropped / max(sum(counts), 1.0),
                    "router_entropy": entropy,
                    "per_token": sum(counts) / max(tokens, 1.0),
                    **{f"aux/{name}": loss for name, loss in zip(self.losses, losses)},
                }
            )
        return records

    def summary(self) -> dict[str, float]:
        """Scalars of the whole model for metrics.jsonl; empty for a dense model.

        `aux/NAME` is summed over the layers, as the losses add up in the gradient; `experts/NAME` is the mean over the
        layers, except `experts/dead` (a sum) and `experts/worst_max_violation` (the largest of any layer).
        """
        records = self.per_layer()
        if not records:
            return {}

        def column(name: str) -> list[float]:
            return [float(record[name]) for record in records]  # type: ignore[arg-type]

        figures = {f"aux/{name}": math.fsum(column(f"aux/{name}")) for name in self.losses}
        for name in ("max_violation", "load_entropy", "load_cv", "dropped_fraction", "router_entropy", "per_token"):
            figures[f"experts/{name}"] = math.fsum(column(name)) / len(records)
        figures["experts/worst_max_violation"] = max(column("max_violation"))
        figures["experts/dead"] = math.fsum(column("dead"))
        return figures


def _balance(counts: list[float]) -> dict[str, float | list[float]]:
    """Balance figures of one layer's load."""
    total, num_experts = math.fsum(counts), len(counts)
    if total == 0:
        nothing = {"max_violation": 0.0, "load_entropy": 1.0, "load_cv": 0.0, "dead": float(num_experts)}
        return {"load": [0.0] * num_experts, **nothing}
    load = [count / total for count in counts]
    entropy = -math.fsum(share * math.log(share) for share in load if share > 0)
    return {
        "load": load,
        "max_violation": max(load) * num_experts - 1.0,
        "load_entropy": entropy / math.log(num_experts) if num_experts > 1 else 1.0,
        "load_cv": math.sqrt(math.fsum((share * num_experts - 1.0) ** 2 for share in load) / num_experts),
        "dead": float(sum(count == 0 for count in counts)),
    }


class RouterStatistics:
    """Collects router figures during a step without making the host wait for the device.

    Args:
        layers: numbers of the MoE layers, as they call `record`.
        num_experts: E.
        device: where the routers run.
        gather: what each rank passes, by rank. Given where ranks hold different layers, so that each learns which
            losses the others have.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        device: torch.device | str = "cpu",
        gather: Callable[[list[str]], list[list[str]]] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self._row = {layer: row for row, layer in enumerate(self.layers)}
        self._num_experts, self._device = num_experts, torch.device(device)
        self._gather = gather
        self._elsewhere: list[str] | None = None
        self._reset()

    def _reset(self) -> None:
        rows = len(self.layers)
        self._sums = torch.zeros(rows, self._num_experts + 3, dtype=torch.float64, device=self._device)
        self._losses: dict[str, Tensor] = {}

    @torch.no_grad()
    def record(self, layer: int, routed: RouterOutput, num_tokens: int) -> None:
        """Add one forward pass of a layer over `num_tokens` tokens."""
        row = self._row[layer]
        sums = self._sums[row]
        sums[: self._num_experts] += routed.counts
        sums[-3] += num_tokens
        sums[-2] += routed.dropped
        sums[-1] += routed.entropy
        for name, loss in routed.losses.items():
            if name not in self._losses:
                self._losses[name] = torch.zeros_like(self._sums[:, 0])
            self._losses[name][row] += loss.detach().double() * num_tokens

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> StepStatistics:
        """Sum over all ranks, in one call on one tensor, and start the next step. Every rank must call it."""
        if self._elsewhere is None:  # asked once: which losses a router has does not change
            own = sorted(self._losses)
            self._elsewhere = [] if self._gather is None else [name for names in self._gather(own) for name in names]
        names = sorted({*self._losses, *self._elsewhere})  # the same order on every rank
        losses = [self._losses.get(name, torch.zeros_like(self._sums[:, 0])) for name in names]
        packed = torch.cat([self._sums, *(loss[:, None] for loss in losses)], dim=1)
        self._reset()
        if self.layers:
            packed = sum_over_ranks(packed)
        counts, figures = packed[:, : self._num_experts], packed[:, self._num_experts :]
        tokens, dropped, entropy, *losses = figures.unbind(1)
        tokens_or_1 = tokens.clamp_min(1)
        return StepStatistics(
            layers=self.layers,
            counts=counts,
            tokens=tokens,
            dropped=dropped,
            entropy=entropy / tokens_or_1,
            losses={name: loss / tokens_or_1 for name, loss in zip(names, losses)},
        )
