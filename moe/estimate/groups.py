"""Which ranks a kind of group has, and how many of its messages leave a machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from ...parallel.layout import ResolvedLayout


@dataclass(frozen=True)
class Span:
    """A kind of group on machines of so many ranks, over all groups of the kind.

    Attributes:
        size: ranks of a group.
        inside: fewest ranks of one group on a machine that has some of it.
        next: share of the ranks whose next one in a ring is on another machine.
        after: the same without the step from the last to the first, as in a pipeline.
        others: share of the other ranks of a group that are on other machines.
    """

    size: int
    inside: int
    next: float
    after: float
    others: float

    @property
    def crosses(self) -> bool:
        return self.others > 0


@lru_cache(maxsize=65536)
def span(layout: ResolvedLayout, name: str, ranks_per_node: int) -> Span:
    """Of the groups that `ResolvedLayout.groups` calls by this name."""
    stride, size = stride_and_size(layout, name)
    return _span(stride, size, layout.world, ranks_per_node)


def stride_and_size(layout: ResolvedLayout, name: str) -> tuple[int, int]:
    """A group is the ranks r, r + stride, …, `size` of them: neighbouring digits of a rank's number in its grid."""
    shards, slices = layout.dp_shard * layout.cp, layout.ep * layout.etp
    return {
        "pp": (layout.stage, layout.pp),
        "dp_replicate": (layout.tp * shards, layout.dp_replicate),
        "dp_cp": (layout.tp, shards),
        "cp": (layout.tp, layout.cp),
        "tp": (1, layout.tp),
        "sequence": (1, layout.cp * layout.tp),
        "edp_replicate": (slices * layout.edp_shard, layout.edp_replicate),
        "edp_shard": (slices, layout.edp_shard),
        "ep": (layout.etp, layout.ep),
        "etp": (1, layout.etp),
        "dispatch": (1, slices),
        "stage": (1, layout.stage),
    }[name]


@lru_cache(maxsize=4096)
def _span(stride: int, size: int, world: int, ranks_per_node: int) -> Span:
    inside, ring, line, apart, pairs = size, 0, 0, 0, 0
    for first in range(world):
        if first // stride % size:
            continue
        nodes = [(first + stride * index) // ranks_per_node for index in range(size)]
        counts = Counter(nodes).values()
        inside = min(inside, *counts)
        steps = sum(here != there for here, there in zip(nodes, nodes[1:]))
        line += steps
        ring += steps + (nodes[-1] != nodes[0])
        apart += size * size - sum(count * count for count in counts)
        pairs += size * (size - 1)
    groups = world // size
    return Span(size, inside, ring / world, line / max(groups * (size - 1), 1), apart / max(pairs, 1))
