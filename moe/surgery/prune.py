"""Fewer experts: the others leave with their rows of the router (2206.00277; 2505.03531 on what that costs)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ...kernels import ConfigError
from ...parallel.checkpoint.lazy import LazyTensor, take
from ..interop.stored import StoredModel
from .mixture import Mixture

Kept = Mapping[int, Sequence[int]]


def most_used(mixture: Mixture, scores: Mapping[int, Tensor], keep: int) -> dict[int, list[int]]:
    """By layer, the `keep` experts with the highest scores in ascending order; of equal ones the lowest ids.

    Of a group-limited router every group keeps as many.
    """
    each = mixture.per_pool(keep, "keep")
    kept: dict[int, list[int]] = {}
    for layer in mixture.layers:
        ranked = [sorted(pool, key=lambda expert: (-float(scores[layer][expert]), expert)) for pool in mixture.pools]
        kept[layer] = sorted(expert for pool in ranked for expert in pool[:each])
    return kept


def check_kept(mixture: Mixture, experts: Sequence[int]) -> list[int]:
    """Experts that a user names, in ascending order.

    Raises: ConfigError for one that is not there or named twice, or groups that would keep different numbers.
    """
    for expert in experts:
        if not 0 <= expert < mixture.num_experts:
            raise ConfigError(f"experts={list(experts)} names {expert}, allowed: 0 to {mixture.num_experts - 1}")
    if not experts or len(set(experts)) < len(experts):
        raise ConfigError(f"experts={list(experts)} is wrong, allowed: one or more experts, each once")
    counts = {len(set(pool) & set(experts)) for pool in mixture.pools}
    if len(counts) > 1:
        raise ConfigError(
            f"experts={list(experts)} keeps {min(counts)} to {max(counts)} experts of a group of "
            f"router.num_groups={len(mixture.pools)}, allowed: as many of each"
        )
    return sorted(experts)


def prune(mixture: Mixture, kept: Kept, top_k: int | None = None) -> StoredModel:
    """The model with these experts of each layer only, two or more of them (`dense.to_dense` leaves one).

    Combine weights that are renormalised, or sigmoid scores by themselves, stay what they were for tokens whose experts
    are all kept; those of a raw softmax grow by 1 / (1 - the mass of the pruned experts).

    Args:
        kept: by layer, as many of each.
        top_k: of the router; None for as before, or all that are left.

    Raises: ConfigError if the router cannot choose among so few.
    """
    (number,) = {len(experts) for experts in kept.values()}
    config = mixture.config_of(number, **mixture.lowered(number, top_k))

    def change(layer: int, name: str, tensor: LazyTensor) -> LazyTensor:
        return take(tensor, 0, list(kept[layer]))

    return mixture.rebuilt(config, change)
