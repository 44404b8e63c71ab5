"""What every way of upcycling does: the new config, each expert of each layer, and what it promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...kernels import ConfigError
from ...parallel.checkpoint.lazy import LazyTensor, computed
from ..models.config import ModelConfig
from .draws import normal, permutation
from .matrices import Matrices, stacked
from .scaling import chosen_scale, constant_of, factors_of, keeps_function
from .settings import UpcycleSettings

TARGETS = {"top_k": "scatterfold.moe.routers.TopKRouter", "threshold": "scatterfold.moe.routers.ThresholdRouter"}
EXPERTS = "scatterfold.moe.Experts"


@dataclass(frozen=True)
class Promise:
    """Whether the result computes what its source does, up to rounding, and why."""

    exact: bool
    why: str


class Method:
    """A way of upcycling, for one dense model; a method is a subclass that overrides what it does differently.

    Experts are numbered copy-major: expert e is shard e % G of copy e // G. Everything is lazy: nothing is read before
    the result is.

    Args:
        settings: of the conversion.
        model: the dense source.
        sources: how many of that shape there are.

    Raises: ConfigError if the settings do not fit the model.
    """

    many = False  # whether it takes several dense models

    def __init__(self, settings: UpcycleSettings, model: ModelConfig, sources: int = 1) -> None:
        self.settings, self.model, self.sources = settings, model, sources
        self.layers = converted_layers(settings.layers, model.layers)
        assert model.ffn_width is not None  # a dense model has one
        self.ffn_width = model.ffn_width
        self.check()
        self.scale = chosen_scale(settings, model.activation)
        self.constant = self.make_constant()
        self.factors = factors_of(self.scale, self.constant, model.activation)

    # What methods differ in.

    @property
    def group(self) -> int:
        """Experts that share a router row, and together are one copy of what they were cut from."""
        return self.settings.granularity

    @property
    def expert_width(self) -> int:
        """F."""
        return self.ffn_width // self.settings.granularity

    def check(self) -> None:
        """Raise ConfigError if the settings do not fit the model."""
        check_width(self.settings.granularity, self.ffn_width)
        self.check_groups()

    def make_constant(self) -> float:
        """c, see `scaling`."""
        return constant_of(self.settings, self.group)

    @property
    def shards(self) -> int:
        """Experts of one copy."""
        return self.group

    def routed(self, mlp: Matrices) -> Matrices:
        """The neurons of a dense MLP that become routed experts."""
        return mlp

    def cut(self, mlps: Sequence[Matrices], layer: int, expert: int) -> Matrices:
        """The neurons of one expert, before anything is scaled or drawn anew; also of the optimizer's moments.

        Args:
            mlps: the dense MLP of that layer, of each source.
        """
        copy, shard = divmod(expert, self.shards)
        mlp = self.routed(mlps[0])
        if self.settings.shuffle:
            count = self.shards * self.expert_width
            mlp = mlp.reordered(lambda: permutation(count, self.settings.seed, layer, copy, "order"))
        return mlp if self.shards == 1 else mlp.neurons(shard * self.expert_width, self.expert_width)

    def change(self, expert_mlp: Matrices, layer: int, expert: int) -> Matrices:
        """What a method does to the values of an expert on purpose."""
        return expert_mlp

    def model_changes(self) -> dict[str, Any]:
        """Further fields of the `model` group."""
        return {}

    def experts_node(self) -> dict[str, Any]:
        """The `experts` group."""
        node: dict[str, Any] = {"_target_": EXPERTS}
        return node if self.model.activation == "swiglu" else {**node, "activation": self.model.activation}

    def experts(self, mlps: Sequence[Matrices], layer: int) -> dict[str, LazyTensor]:
        """The experts of one layer, under their names in it."""
        made = (self.change(self.cut(mlps, layer, expert), layer, expert) for expert in range(self.settings.experts))
        return stacked([expert.scaled(self.factors) for expert in made], "experts.")

    def besides(self, mlp: Matrices, suffix: str = "", exponent: int = 1) -> dict[str, LazyTensor]:
        """Tensors of a MoE layer besides router and experts, under their names in it; or moments as of `moments`."""
        return {}

    def fresh(self) -> tuple[str, ...]:
        """Tensors of a MoE layer that have nothing of the source, so that their moments begin at zero."""
        return ()

    def merged(self, tensors: Sequence[LazyTensor]) -> LazyTensor:
        """A tensor outside of the experts, from that of each source."""
        return tensors[0]

    def intent(self) -> str | None:
        """What the method changes on purpose, so that the result differs from its source; None for nothing."""
        return None

    # What they share.

    def check_groups(self) -> None:
        """Raise ConfigError unless every token takes whole copies."""
        for name in ("experts", "top_k"):
            value = getattr(self.settings, name)
            if value % self.group:
                raise ConfigError(
                    f"{name}={value} is not a multiple of the {self.group} routed shards of a copy, of which a token "
                    f"would get a part, allowed: a multiple of {self.group}"
                )

    def groups(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the result, of the same shape as the source's; nothing is frozen, for its names may be gone."""
        model = {
            **source["model"],
            **layer_fields(self.settings.layers, self.layers, self.model.layers),
            "num_experts": self.settings.experts,
            "expert_width": self.expert_width,
            **self.model_changes(),
        }
        if len(self.layers) == self.model.layers:
            model["ffn_width"] = None  # no layer is left that has one
        model.pop("frozen", None)
        return {**source, "model": model, "router": self.router_node(), "experts": self.experts_node()}

    def router_node(self) -> dict[str, Any]:
        """The `router` group."""
        settings = self.settings
        node: dict[str, Any] = {"_target_": TARGETS[settings.router]}
        if settings.router == "threshold":
            node |= {"threshold": settings.threshold, "max_experts": settings.top_k}
        else:
            node |= {"top_k": settings.top_k}
            if settings.score != "softmax":
                node["score"] = settings.score
        node["renormalise"] = settings.renormalises
        for name, value in (("scale", self.factors.output), ("z_loss", settings.z_loss)):
            if value != {"scale": 1.0, "z_loss": 0.0}[name]:
                node[name] = value
        return node | ({"balance_micro_batch": settings.balance_micro_batch} if settings.balance_micro_batch else {})

    def tensors(self, mlps: Sequence[Matrices], layer: int) -> dict[str, LazyTensor]:
        """All tensors of one MoE layer, under their names in it."""
        router = self.router_rows(layer, mlps[0].up.dtype)
        return {"router.weight": router, **self.experts(mlps, layer), **self.besides(mlps[0])}

    def moments(self, mlps: Sequence[Matrices], layer: int, suffix: str, exponent: int) -> dict[str, LazyTensor]:
        """What an optimizer remembers of the source's MLPs, for the tensors of one MoE layer that come from them.

        Args:
            mlps: its state of their matrices.
            suffix: of the names.
            exponent: a weight times k has it times k to this power: -1 for gradients, -2 for their squares.
        """
        factors = self.factors.power(exponent)
        cut = [self.cut(mlps, layer, expert).scaled(factors) for expert in range(self.settings.experts)]
        found = {**stacked(cut, "experts.", suffix), **self.besides(mlps[0], suffix, exponent)}
        return {name: tensor for name, tensor in found.items() if name.removesuffix(suffix) not in self.fresh()}

    def router_rows(self, layer: int, dtype: Any) -> LazyTensor:
        """(E, D): one row a virtual group."""
        settings, width = self.settings, self.model.width

        def drawn() -> Tensor:
            rows = normal((settings.experts // self.group, width), settings.row_std, settings.seed, layer, "router")
            return rows.repeat_interleave(self.group, 0).to(dtype)

        return computed((settings.experts, width), dtype, drawn)

    def promise(self) -> Promise:
        """Whether the result's output is the source's, by construction."""
        settings, activation = self.settings, self.model.activation
        intent = self.intent()
        if intent is not None:
            return Promise(False, intent)
        if self.constant != 1.0 and not keeps_function(self.scale, activation):
            return Promise(False, f"scale={self.scale} is not exact for {activation}, scale=down is")
        if not settings.renormalises and (settings.top_k < settings.experts or settings.score == "sigmoid"):
            even = settings.row_std <= 1e-7
            return Promise(even, f"raw {settings.score} weights are even up to router_std={settings.row_std:g}")
        copies = f"{self.group} shards of a copy share a router row, " if self.group > 1 else ""
        return Promise(
            True, f"{copies}the weights of a token sum to one and the experts' constant is {self.constant:g}"
        )


def check_width(granularity: int, ffn_width: int) -> None:
    """Raise ConfigError unless the dense MLP can be cut evenly."""
    if ffn_width % granularity:
        raise ConfigError(
            f"granularity={granularity} does not divide the dense MLP's hidden width {ffn_width}, allowed: a divisor"
        )


def converted_layers(layers: str | tuple[int, ...], count: int) -> list[int]:
    """Numbers of the layers that become MoE layers."""
    if layers == "all":
        return list(range(count))
    if layers == "every_other":
        chosen = list(range(1, count, 2))
    elif layers == "last_half":
        chosen = list(range(count // 2, count))
    else:
        chosen = sorted({int(layer) for layer in layers})
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        shown = layers if isinstance(layers, str) else list(layers)
        raise ConfigError(f"layers={shown} does not fit a model of {count} layers, allowed: 0 to {count - 1}")
    return chosen


def layer_fields(layers: str | tuple[int, ...], chosen: list[int], count: int) -> dict[str, Any]:
    """The same as fields of the `model` group, in the words of the architectures of others where they have them."""
    fields: dict[str, Any] = {"first_k_dense": 0, "moe_every": 1, "moe_layers": None}
    if layers == "every_other":
        return {**fields, "moe_every": 2}
    if chosen == list(range(chosen[0], count)):
        return {**fields, "first_k_dense": chosen[0]}
    return {**fields, "moe_layers": chosen}
