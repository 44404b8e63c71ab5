"""Our own layer: routing tables from the chosen experts, then `moe_mlp`."""

from __future__ import annotations

from torch import Tensor

from .....kernels import ConfigError, Routing, moe_mlp
from .....kernels.availability import interprets
from .....kernels.backends import check_serves
from ..case import Case, Layer, Refused, leaf


def build(backend: str, case: Case) -> Layer:
    """One backend. Building the tables counts, as sorting counts for the peers."""
    try:
        check_serves(backend, case.x)
    except ConfigError as error:
        raise Refused(str(error)) from None
    if backend == "triton" and interprets():
        raise Refused("Triton's interpreter says nothing about speed")
    x, w_in, w_out, weights = leaf(case.x), leaf(case.w_in), leaf(case.w_out), leaf(case.weights)

    def forward() -> Tensor:
        routing = Routing.from_topk(case.experts, weights, case.shape.experts)
        return moe_mlp(x, w_in, w_out, routing, backend=backend)

    return Layer(forward, x, case.grad, (w_in, w_out), weights)
