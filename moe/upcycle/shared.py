"""Upcycling that keeps a dense part which every token passes (DeepSeekMoE's and Qwen2-MoE's shared expert)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...kernels import ConfigError
from ...parallel.checkpoint.lazy import LazyTensor, constant
from .matrices import Factors, Matrices
from .method import Method, Promise, check_width


class Shared(Method):
    """The shared expert is the dense MLP, or m of its G shards.

    - shared_shards=0: it is all of it, and the routed experts are copies (or shards, with granularity) with a `down` of
      zeros. More computation per token than before; gate and up of an expert get a gradient once its down has moved.
    - shared_shards=m: the other G' = G - m shards are routed, in virtual groups with c = G' (see `scaling`).

    With shared_gate a token scales the shared output by sigmoid(x . w): w is zero at the start, so it halves, and the
    shared down is doubled.
    """

    @property
    def whole(self) -> bool:
        """Whether the shared expert is the whole dense MLP."""
        return self.settings.shared_shards == 0

    @property
    def group(self) -> int:
        return 1 if self.whole else self.settings.granularity - self.settings.shared_shards

    def check(self) -> None:
        granularity, shards = self.settings.granularity, self.settings.shared_shards
        check_width(granularity, self.ffn_width)
        if shards >= granularity and not self.whole:
            raise ConfigError(
                f"shared_shards={shards} leaves nothing to route of granularity={granularity}, allowed: 1 to "
                f"{granularity - 1}, or 0 for the whole dense MLP"
                if granularity > 1
                else f"shared_shards={shards} needs a granularity above it, allowed: 0 with granularity=1"
            )
        if self.whole and self.settings.experts % granularity:
            raise ConfigError(
                f"experts={self.settings.experts} is not a multiple of granularity={granularity}, allowed: a multiple"
            )
        if self.whole and self.settings.scale is not None:
            raise ConfigError(
                f"scale={self.settings.scale} means nothing where routed experts begin with a zero output, allowed: "
                "null, or shared_shards of 1 or more"
            )
        self.check_groups()

    def make_constant(self) -> float:
        return 1.0 if self.whole else super().make_constant()

    @property
    def shards(self) -> int:
        return self.settings.granularity if self.whole else self.group

    def routed(self, mlp: Matrices) -> Matrices:
        first = self.settings.shared_shards * self.expert_width
        return mlp.neurons(first, self.ffn_width - first)

    def change(self, expert_mlp: Matrices, layer: int, expert: int) -> Matrices:
        if not self.whole:
            return expert_mlp
        down = expert_mlp.down
        return replace(expert_mlp, down=constant(0.0, down.shape, down.dtype))

    def besides(self, mlp: Matrices, suffix: str = "", exponent: int = 1) -> dict[str, LazyTensor]:
        shared = mlp if self.whole else mlp.neurons(0, self.shared_width)
        factors = Factors(down=2.0 if self.settings.shared_gate else 1.0).power(exponent)
        tensors = shared.scaled(factors).dense("shared.", suffix)
        if self.settings.shared_gate and not suffix:
            tensors["shared.gate.weight"] = constant(0.0, (1, self.model.width), mlp.up.dtype)
        return tensors

    def fresh(self) -> tuple[str, ...]:
        return ("experts.w_out",) if self.whole else ()

    @property
    def shared_width(self) -> int:
        return self.ffn_width if self.whole else self.settings.shared_shards * self.expert_width

    def model_changes(self) -> dict[str, Any]:
        return {"shared_expert_width": self.shared_width, "shared_expert_gate": self.settings.shared_gate}

    def promise(self) -> Promise:
        if self.whole:
            return Promise(True, "the shared expert is the dense MLP and the routed ones begin with a zero output")
        return super().promise()
