"""What a dispatcher does: bring every token to its experts, and the weighted sums back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ...kernels import Routing
from ...kernels.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Pending(Generic[T]):
    """A value that may still be under way; `wait()` gives it, and is called once."""

    wait: Callable[[], T]


@dataclass(frozen=True)
class Arrival:
    """Rows at the rank of their experts.

    Attributes:
        rows: (R, D).
        routing: of these rows over the experts of this rank. Rows and assignments beyond what it names are padding.
        handle: what `combine` needs to bring the sums back.
    """

    rows: Tensor
    routing: Routing
    handle: Any = None


@dataclass(frozen=True)
class Dispatched:
    """Tokens under way to their experts.

    Attributes:
        chunks: what will arrive here, one after the other; as many on every rank of the group.
        rows_sent: rows that leave this rank for others.
        dropped: () int64, assignments that a bounded buffer had no room for; None where nothing can be dropped.
    """

    chunks: Sequence[Pending[Arrival]]
    rows_sent: int = 0
    dropped: Tensor | None = None


class Dispatcher(Protocol):
    """Moves tokens between the ranks that hold their experts.

    The constructor takes `meshes`, this rank's place in the layout, and the options of its transport. Expert e of E is
    on the ranks with ep index e // (E / EP); each of its etp ranks holds a slice of the expert's hidden units and
    returns a partial sum. A dispatcher keeps no state of a batch: what `combine` needs travels in `Arrival.handle`, so
    two micro-batches may be in flight. Every rank of the group calls the same methods in the same order, also with no
    token at all, and the autograd graph is connected then too: the backward pass communicates as the forward pass did.
    """

    def check(self, num_experts: int, expert_width: int) -> None:
        """Raise ConfigError unless E experts of F hidden units can be spread over the ranks."""
        ...

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts of which this rank holds all or a slice."""
        ...

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Start to bring tokens to the ranks that hold their experts; return while they travel.

        Differentiable in x and routing.weight.
        Shapes: x (T, D), routing over T tokens and all E experts.
        """
        ...

    def combine(self, partial: Tensor, arrival: Arrival) -> Pending[Tensor]:
        """Start to bring the partial sums of one arrival back: (R, D) -> the sums of its tokens.

        The chunks together are the T tokens in their order. A token without experts gets zeros.
        """
        ...


def run_experts(dispatcher: Dispatcher, dispatched: Dispatched, experts: Callable[[Tensor, Routing], Tensor]) -> Tensor:
    """Compute each chunk when it arrives, start its sums back at once, and wait for them at the end: (T, D).

    While the experts compute one chunk, later chunks and earlier sums travel.
    """
    returning = []
    for chunk in dispatched.chunks:
        arrival = chunk.wait()
        returning.append(dispatcher.combine(experts(arrival.rows, arrival.routing), arrival))
    sums = [pending.wait() for pending in returning]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def check_spread(num_experts: int, expert_width: int, ep: int, etp: int) -> None:
    """Raise ConfigError unless every rank gets as many experts, and slices of one width."""
    if num_experts % ep:
        raise ConfigError(
            f"model.num_experts={num_experts} does not divide by layout.ep={ep}, allowed: multiples of {ep}"
        )
    if expert_width % etp:
        raise ConfigError(
            f"model.expert_width={expert_width} does not divide by layout.etp={etp}, allowed: multiples of {etp}"
        )
