"""The dispatcher of expert parallelism 1: every expert is here, nothing travels."""

from __future__ import annotations

from torch import Tensor

from ...kernels import Routing


class LocalDispatcher:
    """Experts and tokens are on the same rank; dispatch and combine are the identity."""

    def local_experts(self, num_experts: int) -> range:
        return range(num_experts)

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, None]:
        return x, routing, None

    def combine(self, partial: Tensor, handle: None) -> Tensor:
        return partial
