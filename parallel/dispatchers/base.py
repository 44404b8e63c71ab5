"""What a dispatcher does: bring every token to its experts, and the weighted sums back."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ...kernels import Routing


class Dispatcher(Protocol):
    """Moves tokens between the ranks that hold their experts.

    A dispatcher keeps no per-batch state: what `combine` needs travels in the handle that `dispatch` returns, so
    that two micro-batches may be in flight.
    """

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts that this rank holds."""
        ...

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Any]:
        """Send every token once to each rank that holds one of its experts.

        Shapes: x (T, D), routing over all experts -> rows (R, D), routing of those rows over the local experts,
        and a handle for `combine`.
        """
        ...

    def combine(self, partial: Tensor, handle: Any) -> Tensor:
        """Bring one partial sum per (token, rank) back and add them up: (R, D) -> (T, D)."""
        ...
