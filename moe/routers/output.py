"""What a router hands to the layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...kernels import Routing


@dataclass(frozen=True)
class RouterOutput:
    """A routing, the auxiliary losses of this pass, and figures about the decision.

    Attributes:
        routing: which token goes to which expert with what weight, after dropping.
        losses: () each, by name; the coefficient is included, and each is a mean over the tokens of this pass.
        counts: (E,) int64, assignments that the router wanted, before dropping.
        dropped: () int64, assignments that did not fit into an expert's capacity.
        entropy: () float, sum over the tokens of the entropy of the router's distribution, in nats.
    """

    routing: Routing
    losses: dict[str, Tensor]
    counts: Tensor
    dropped: Tensor
    entropy: Tensor
