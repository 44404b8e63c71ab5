"""Fewer experts: those that are alike become one, their weighted mean (2310.01334, 2410.08589)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

from torch import Tensor

from ...parallel.checkpoint.lazy import Index, LazyTensor, select, stack, take
from ..interop.stored import StoredModel
from ..sharding import EXPERT_WIDTH_DIMENSIONS
from .matching import match_neurons, neurons
from .mixture import Mixture
from .similarity import around_dominant, by_average_linkage

Groups = Mapping[int, Sequence[Sequence[int]]]
GROUPINGS: dict[str, Callable[[Tensor, Tensor, Sequence[int], int], list[list[int]]]] = {
    "dominant": around_dominant,
    "hierarchical": by_average_linkage,
}


def groups_of(
    mixture: Mixture, alike: Mapping[int, Tensor], used: Mapping[int, Tensor], experts: int, grouping: str
) -> dict[int, list[list[int]]]:
    """By layer, which experts become one: `experts` groups in ascending order of their first members.

    Of a group-limited router, only experts of one of its groups come together.

    Args:
        alike: by layer, (E, E) similarities.
        used: by layer, (E,) shares; the first of each group is its most used.
        grouping: one of `GROUPINGS`.
    """
    each, group = mixture.per_pool(experts, "experts"), GROUPINGS[grouping]
    return {
        layer: [members for pool in mixture.pools for members in sorted(group(alike[layer], used[layer], pool, each))]
        for layer in mixture.layers
    }


def merge(
    mixture: Mixture, groups: Groups, used: Mapping[int, Tensor], top_k: int | None = None, align: bool = False
) -> StoredModel:
    """The model in which each group of experts is one.

    A merged expert, its row and biases of the router are the means of the members' by their use; unused members of a
    group without any use count alike. The load that a balance loss remembers adds up.

    Args:
        groups: by layer, as many of each; the first of a group is whom the others are aligned to.
        used: by layer, (E,) shares.
        top_k: of the router; None for as before, or all that are left.
        align: before the mean, put the neurons of each member into the order in which they are most like those of the
            first. Reads the experts of a layer when one of them is needed; takes time with the cube of their width.

    Raises: ConfigError if the router cannot choose among so few.
    """
    (number,) = {len(of_layer) for of_layer in groups.values()}
    config = mixture.config_of(number, **mixture.lowered(number, top_k))
    orders = _Orders(mixture) if align else None

    def change(layer: int, name: str, tensor: LazyTensor) -> LazyTensor:
        merged = []
        for members in groups[layer]:
            shares = [1.0] * len(members) if name.endswith(".load") else _shares(used[layer], members)
            parts = [select(tensor, expert) for expert in members]
            if orders is not None and name.removeprefix(mixture.stack) in EXPERT_WIDTH_DIMENSIONS:
                others = zip(members[1:], parts[1:])
                parts = [parts[0], *(orders.apply(layer, name, members[0], e, part) for e, part in others)]
            merged.append(weighted_sum(parts, shares))
        return stack(merged)

    return mixture.rebuilt(config, change)


def weighted_sum(tensors: Sequence[LazyTensor], weights: Sequence[float]) -> LazyTensor:
    """The sum of tensors of one shape times a number each, in float32, rounded once to their dtype."""
    first = tensors[0]
    if len(tensors) == 1 and weights[0] == 1.0:
        return first

    def fetch(index: Index) -> Tensor:
        total = tensors[0].read(index).float() * weights[0]
        for tensor, weight in zip(tensors[1:], weights[1:]):
            total.add_(tensor.read(index).float(), alpha=weight)
        return total

    return LazyTensor(first.shape, first.dtype, fetch)


class _Orders:
    """In which order the neurons of an expert are like those of another, found once for all of its matrices."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self.order = cache(self._order)

    def apply(self, layer: int, name: str, first: int, expert: int, tensor: LazyTensor) -> LazyTensor:
        """One tensor of an expert with its neurons in that order, which is found when it is read."""
        dim = EXPERT_WIDTH_DIMENSIONS[name.removeprefix(self._mixture.stack)] % len(tensor.shape)

        def fetch(index: Index) -> Tensor:
            return take(tensor, dim, self.order(layer, first, expert)).read(index)

        return LazyTensor(tensor.shape, tensor.dtype, fetch)

    def _order(self, layer: int, first: int, expert: int) -> list[int]:
        stack_of = self._mixture.stack
        found = {
            name.removeprefix(stack_of): tensor
            for name, tensor in self._mixture.per_expert(layer).items()
            if name.removeprefix(stack_of) in EXPERT_WIDTH_DIMENSIONS
        }
        dims = [EXPERT_WIDTH_DIMENSIONS[name] for name in found]
        one, other = ([select(tensor, at).read().float() for tensor in found.values()] for at in (first, expert))
        return match_neurons(neurons(one, dims), neurons(other, dims))


def _shares(used: Tensor, members: Sequence[int]) -> list[float]:
    own = [float(used[expert]) for expert in members]
    total = sum(own)
    return [share / total if total > 0 else 1.0 / len(members) for share in own]
