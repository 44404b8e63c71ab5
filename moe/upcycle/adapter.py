"""Parameter-efficient upcycling (PESC, 2401.02731): one frozen dense MLP, and adapters on its output as experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...parallel.checkpoint.lazy import LazyTensor, computed, constant, stack
from .draws import normal
from .matrices import Matrices
from .method import Method

ADAPTERS = "scatterfold.moe.AdapterExperts"


class Adapter(Method):
    """The dense MLP stays once per layer, frozen; only adapters and router are new, and small.

    An adapter begins with a zero second matrix, so the start is exact; its first one is drawn as that of a fresh
    `AdapterExperts`. The constant for weights that do not sum to one multiplies the dense MLP.
    """

    def experts_node(self) -> dict[str, Any]:
        node = {"_target_": ADAPTERS, "adapter_width": self.settings.adapter_width}
        return node if self.model.activation == "swiglu" else {**node, "activation": self.model.activation}

    def experts(self, mlps: Sequence[Matrices], layer: int) -> dict[str, LazyTensor]:
        settings, width, dtype = self.settings, self.model.width, mlps[0].up.dtype
        shape = (settings.adapter_width, width)

        def adapter(expert: int) -> LazyTensor:
            def drawn() -> Tensor:
                return normal(shape, width**-0.5, settings.seed, layer, expert, "adapter").to(dtype)

            return computed(shape, dtype, drawn)

        return {
            **mlps[0].scaled(self.factors).dense("experts.ffn."),
            "experts.adapters.w_in": stack([adapter(expert) for expert in range(settings.experts)]),
            "experts.adapters.w_out": constant(0.0, (settings.experts, width, settings.adapter_width), dtype),
        }

    def moments(self, mlps: Sequence[Matrices], layer: int, suffix: str, exponent: int) -> dict[str, LazyTensor]:
        """None: the dense MLP is frozen, and the adapters are new."""
        return {}
