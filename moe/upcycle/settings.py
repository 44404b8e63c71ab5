"""What to make of a dense model, checked as far as it can be without knowing the model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ...kernels import ConfigError

METHODS = ("sparse", "fine_grained", "drop", "noise", "shared", "adapter", "branch_train_mix")
LAYERS = ("all", "every_other", "last_half")
SCALES = ("up_down", "down", "output", "cube_root")
ROUTERS = ("top_k", "threshold")
SCORES = ("softmax", "sigmoid")
INDICES = ("shared", "per_matrix")
OPTIMIZER = ("reset", "carry")

# Settings that mean something to some methods only.
_OWN = {
    "granularity": ("fine_grained", "shared"),
    "shuffle": ("fine_grained", "shared"),
    "share": ("drop", "noise"),
    "indices": ("drop", "noise"),
    "noise_std": ("noise",),
    "shared_shards": ("shared",),
    "shared_gate": ("shared",),
    "adapter_width": ("adapter",),
}
_CHOICES = {
    "method": METHODS,
    "router": ROUTERS,
    "score": SCORES,
    "indices": INDICES,
    "optimizer": OPTIMIZER,
}


@dataclass(frozen=True)
class UpcycleSettings:
    """How a dense model becomes a MoE.

    Attributes:
        experts: E of each MoE layer.
        top_k: experts per token; for router=threshold the upper bound of them.
        method: sparse, fine_grained, drop, noise, shared, adapter or branch_train_mix.
        layers: which layers become MoE layers: all, every_other (the second, the fourth, ...), last_half, or numbers
            counting from 0.
        granularity: G, how many experts a dense MLP is cut into (fine_grained, shared).
        shuffle: permute the neurons of each copy before it is cut, so that copies are cut differently.
        scale: where the constant goes that makes the experts add up to the dense MLP: up_down, down, output (the
            router's scale) or cube_root (as Megatron-Core; not exact for most activations). None: up_down where that
            is exact, else down.
        router: top_k or threshold.
        score: of the top-k router: softmax or sigmoid.
        renormalise: let the combine weights of a token sum to one; None: yes if K > 1.
        threshold: probability mass of router=threshold.
        router_std: standard deviation of the router's rows; None: 0.02 where weights are renormalised, else 1e-7, for
            then only even weights keep the dense model's output.
        balance_micro_batch, z_loss: coefficients of the new router's losses.
        share: r, part of the neurons that drop redraws and noise disturbs.
        indices: whether gate, up and down of an expert redraw the same neurons (shared) or each its own (per_matrix).
        noise_std: of the noise, relative to the standard deviation of the matrix.
        shared_shards: how many of the G shards a shared expert takes; 0: it is the whole dense MLP, and the routed
            experts begin with a zero output.
        shared_gate: scale the shared expert by a sigmoid gate, as Qwen2-MoE.
        adapter_width: hidden width of an adapter.
        optimizer: reset, or carry: AdamW's moments go with the weights, where the source holds them.
        seed: of all that is drawn.

    Raises: ConfigError that names the field, its value and what is allowed.
    """

    experts: int = 8
    top_k: int = 2
    method: str = "sparse"
    layers: str | tuple[int, ...] = "all"
    granularity: int = 1
    shuffle: bool = False
    scale: str | None = None
    router: str = "top_k"
    score: str = "softmax"
    renormalise: bool | None = None
    threshold: float = 0.5
    router_std: float | None = None
    balance_micro_batch: float = 0.01
    z_loss: float = 0.001
    share: float = 0.5
    indices: str = "shared"
    noise_std: float = 1.0
    shared_shards: int = 0
    shared_gate: bool = False
    adapter_width: int = 64
    optimizer: str = "reset"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        if self.scale is not None:
            _check_choice("scale", self.scale, SCALES)
        if isinstance(self.layers, str):
            _check_choice("layers", self.layers, (*LAYERS, "a list of numbers"))
        self._check_ranges()
        self._check_unused()

    @property
    def renormalises(self) -> bool:
        """Whether the combine weights of a token sum to one."""
        return self.top_k > 1 if self.renormalise is None else self.renormalise

    @property
    def row_std(self) -> float:
        """Standard deviation of the router's rows."""
        if self.router_std is not None:
            return self.router_std
        return 0.02 if self.renormalises else 1e-7

    def _check_ranges(self) -> None:
        for name, least in (
            ("experts", 2),
            ("top_k", 1),
            ("granularity", 1),
            ("shared_shards", 0),
            ("adapter_width", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is too small, allowed: {least} or more")
        if self.top_k > self.experts:
            raise ConfigError(f"top_k={self.top_k} is larger than experts={self.experts}")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share={self.share} is out of range, allowed: 0 to 1")
        if not self.noise_std >= 0:
            raise ConfigError(f"noise_std={self.noise_std} is out of range, allowed: 0 or more")
        if self.router_std is not None and not self.router_std > 0:
            raise ConfigError(
                f"router_std={self.router_std} sends all tokens to the first experts, allowed: above 0, as 1e-7"
            )
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold} is out of range, allowed: above 0, at most 1")

    def _check_unused(self) -> None:
        for name, methods in _OWN.items():
            if self.method not in methods and getattr(self, name) != _default(name):
                raise ConfigError(
                    f"{name}={_show(getattr(self, name))} means nothing to method={self.method}, allowed: with "
                    f"method={' or '.join(methods)}"
                )
        if self.router == "threshold":
            if self.score != "softmax":
                raise ConfigError(f"score={self.score} does not fit router=threshold, allowed: softmax")
            if self.renormalise is False or self.top_k == 1:
                field = "renormalise=false" if self.renormalise is False else "top_k=1"
                raise ConfigError(
                    f"{field} does not fit router=threshold: the mass that a token reaches varies, so no constant "
                    "keeps the dense model's output, allowed: renormalise=true with top_k of 2 or more"
                )
        elif self.threshold != _default("threshold"):
            raise ConfigError(
                f"threshold={self.threshold} means nothing to router=top_k, allowed: with router=threshold"
            )


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value} is unknown, allowed: {', '.join(allowed)}")


def _default(name: str) -> Any:
    return next(field.default for field in fields(UpcycleSettings) if field.name == name)


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
