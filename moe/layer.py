"""The MoE layer: router, dispatcher, experts and shared expert."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..kernels import Routing
from ..parallel.dispatchers import Dispatcher, LocalDispatcher, run_experts
from .context import ALONE, StepContext
from .experts import Experts
from .inject import inject_gradient
from .recompute import recomputing
from .routers.base import Router
from .routers.output import RouterOutput

if TYPE_CHECKING:
    from .adapters import AdapterExperts


class MoELayer(nn.Module):
    """Replace a transformer's MLP by experts, of which each token uses a few.

    Args:
        router: decides which token goes to which expert with what weight.
        experts: of which this rank holds what the dispatcher's `local_experts` says, whole or sliced.
        shared: a module that every token passes besides its experts; None for none.
        dispatcher: brings tokens to the ranks of their experts; None for one process.
        index: number of this layer in the model, under which statistics are recorded.

    Shapes: hidden (..., D) -> (..., D). A token that no expert takes (dropped by capacity) gets the shared expert's
    output, or zeros: in a transformer it goes through the residual.
    Raises: ConfigError if the experts cannot be spread over the dispatcher's ranks.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts | AdapterExperts,
        shared: nn.Module | None = None,
        dispatcher: Dispatcher | None = None,
        index: int = 0,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.dispatcher = dispatcher or LocalDispatcher()
        self.dispatcher.check(experts.num_experts, experts.expert_width)
        self.index = index

    def forward(self, hidden: Tensor, context: StepContext = ALONE) -> Tensor:
        hidden_TD = hidden.flatten(0, -2)
        routed = self.router(hidden_TD, context)
        routing = self._inject_losses(routed, hidden_TD.shape[0], context) if self.training else routed.routing
        dispatched = self.dispatcher.dispatch(self.experts.before(hidden_TD), routing)
        shared_TD = None if self.shared is None else self.shared(hidden_TD)  # while the tokens travel
        out_TD = run_experts(self.dispatcher, dispatched, self.experts)
        if shared_TD is not None:
            out_TD = out_TD + shared_TD
        if context.statistics is not None and not recomputing():
            if dispatched.dropped is not None:
                routed = replace(routed, dropped=routed.dropped + dispatched.dropped)
            context.statistics.record(self.index, routed, hidden_TD.shape[0])
        return out_TD.view_as(hidden)

    def _inject_losses(self, routed: RouterOutput, num_tokens: int, context: StepContext) -> Routing:
        """Hang the losses on the combine weights: every layer's output depends on them, and they are small."""
        scale = num_tokens / (context.global_tokens or max(num_tokens, 1))
        weight = routed.routing.weight
        for loss in routed.losses.values():
            weight = inject_gradient(weight, loss, scale)
        return routed.routing.with_weight(weight)
