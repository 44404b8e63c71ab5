"""The dispatcher of expert parallelism 1: every expert is here, nothing travels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...kernels import Routing
from ...kernels.errors import ConfigError
from .base import Arrival, Dispatched, Pending

if TYPE_CHECKING:
    from ..meshes import Meshes


class LocalDispatcher:
    """Experts and tokens are on the same rank; dispatch and combine are the identity.

    Raises: ConfigError if the layout spreads experts over ranks.
    """

    def __init__(self, meshes: Meshes | None = None) -> None:
        if meshes is not None and meshes.layout.ep * meshes.layout.etp > 1:
            raise ConfigError(
                f"dispatcher=local cannot reach the experts of layout.ep={meshes.layout.ep} x "
                f"layout.etp={meshes.layout.etp} ranks, allowed: dispatcher=all_to_all, dispatcher=all_gather"
            )

    def check(self, num_experts: int, expert_width: int) -> None:
        """Any number and size of experts."""

    def local_experts(self, num_experts: int) -> range:
        return range(num_experts)

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        arrival = Arrival(x, routing)
        return Dispatched((Pending(lambda: arrival),))

    def combine(self, partial: Tensor, arrival: Arrival) -> Pending[Tensor]:
        return Pending(lambda: partial)
