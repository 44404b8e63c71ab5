"""The constant that makes weighted experts add up to the dense MLP, and where it goes.

A dense MLP cut into G shards along its hidden width is their sum, f(x) = sum_g f_g(x), for every activation. Copies
of it give E experts, copy-major: expert e is shard e % G of copy e // G. The G experts of a copy share one router row,
so they tie, and top-K with K % G == 0 takes K / G whole copies r, each of whose experts has one weight w_r. With a
factor c on every expert the layer's output is c * (sum of w_r over the chosen copies) * f(x). So the constant is

    c = G                    if the K weights of a token sum to one: sum w_r = 1 / G, for any score and any token;
    c = R G^2 / K            for raw softmax over E = R G experts with even probabilities 1 / E;
    c = 2 G / K              for raw sigmoid at logits of zero.

The last two hold at even scores only; a fresh router with small rows is close to that.

Where c goes: `down` times c is exact for every activation. `up_down` spreads it over two matrices, because constants on
the second matrix alone train worse (2410.07524); a gated MLP is linear in `up`, so sqrt(c) on each is
exact, and so it is for relu. relu2 is homogeneous of degree two, so its share is c^(1/3). gelu and silu without a gate
are not homogeneous, and clamped_swiglu is not linear in `up`: sqrt(c) on both is not exact. `cube_root` is
Megatron-Core's c^(1/3) on gate, up and down, exact for reglu and relu2 only, because silu(k v) is not k silu(v).
`output` is the `scale` of the router.
"""

from __future__ import annotations

from ...kernels import is_gated
from ...kernels.activations import CLAMPED, GATED
from .matrices import Factors
from .settings import UpcycleSettings

_DEGREE = {"relu": 1, "relu2": 2}  # act(k v) = k^degree act(v) for k > 0


def constant_of(settings: UpcycleSettings, group: int) -> float:
    """c, for virtual groups of `group` experts."""
    if settings.renormalises:
        return float(group)
    if settings.score == "sigmoid":
        return 2.0 * group / settings.top_k
    return settings.experts * group / settings.top_k


def factors_of(scale: str, c: float, activation: str) -> Factors:
    """What each matrix, and the combine weights, are multiplied by."""
    if scale == "output":
        return Factors(output=c)
    if scale == "down":
        return Factors(down=c)
    if scale == "cube_root":
        root = c ** (1 / 3)
        return Factors(root if is_gated(activation) else 1.0, root, root)
    share = c ** (1 / (1 + _DEGREE.get(activation, 1)))
    return Factors(up=share, down=share)


def chosen_scale(settings: UpcycleSettings, activation: str) -> str:
    """The setting, or what stands for None."""
    if settings.scale is not None:
        return settings.scale
    return "up_down" if keeps_function("up_down", activation) else "down"


def keeps_function(scale: str, activation: str) -> bool:
    """Whether a constant placed there multiplies the MLP's output by that very constant."""
    if scale == "cube_root":
        return activation in ("reglu", "relu2")
    linear_in_up = GATED.get(activation, CLAMPED) != CLAMPED
    return scale != "up_down" or linear_in_up or activation in _DEGREE
