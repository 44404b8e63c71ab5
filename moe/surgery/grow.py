"""More experts: copies of those that are there, with noise that cancels among the copies of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import ConfigError
from ...parallel.checkpoint.lazy import Index, LazyTensor, pointwise, select, stack, take
from ..interop.stored import StoredModel
from ..routers.threshold import ThresholdRouter
from ..upcycle.draws import normal
from .mixture import Mixture

Copies = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Noise:
    """How copies of an expert are told apart.

    Attributes:
        down: standard deviation of what is added to the second matrix of each copy, over that of the matrix. Over the
            copies of one expert it adds up to zero: the output is linear in that matrix, so copies that are chosen
            together with equal weights still make what the one expert made.
        router: the same of the rows of the router, where nothing cancels: copies are then not chosen together.
        seed: of both.
    """

    down: float = 0.01
    router: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field, value in (("noise", self.down), ("router_noise", self.router)):
            if not value >= 0:
                raise ConfigError(f"{field}={value} is out of range, allowed: 0 or more")


def copies_of(mixture: Mixture, experts: int, used: Mapping[int, Tensor] | None) -> dict[int, list[int]]:
    """By layer, of which expert each new one is a copy, in ascending order: all as often, the most used once more.

    Args:
        experts: how many there will be.
        used: by layer, (E,) shares; needed unless `experts` is a multiple. Of equally used ones the lowest ids are
            copied once more.

    Raises: ConfigError if there is nothing to go by, or a group-limited router cannot be grown so.
    """
    times, rest = divmod(experts, mixture.num_experts)
    more = mixture.per_pool(rest, "experts")
    if rest and used is None:
        raise ConfigError(
            f"experts={experts} copies some experts more often than others, by their use, allowed: data=CORPUS, or a "
            f"multiple of {mixture.num_experts}"
        )
    found: dict[int, list[int]] = {}
    for layer in mixture.layers:
        twice: set[int] = set()
        for pool in mixture.pools:
            ranked = sorted(pool, key=lambda e: (0.0 if used is None else -float(used[layer][e]), e))
            twice.update(ranked[:more])
        found[layer] = [e for e in range(mixture.num_experts) for _ in range(times + (e in twice))]
    return found


def grow(mixture: Mixture, copies: Copies, noise: Noise, top_k: int | None = None) -> StoredModel:
    """The model with copies of its experts; the copies of one stand side by side.

    A copy has the row of its expert, so both score the same, and are chosen one after the other. Where every expert has
    c copies and a token takes c times as many as before (`top_k=None`), the same experts are chosen, each c times, and
    the output is what it was: renormalised weights are c times smaller each, as are those of a softmax over c times as
    many experts, and of raw sigmoid scores `scale` becomes c times smaller. A threshold router takes all or none of
    equal experts, up to `max_experts`. Otherwise copies take the places of other experts, and the output changes.

    Args:
        copies: by layer, as `copies_of` says.
        top_k: None for c times as many where every expert has c copies, else as before.

    Raises: ConfigError if the router cannot choose so many.
    """
    (experts,) = {len(of_layer) for of_layer in copies.values()}
    times = experts // mixture.num_experts if experts % mixture.num_experts == 0 else 1
    values = _router_values(mixture, times, top_k)
    config = mixture.config_of(experts, **values)
    whole = times > 1 and top_k is None

    def change(layer: int, name: str, tensor: LazyTensor) -> LazyTensor:
        origin = list(copies[layer])
        if name == f"{mixture.stack}w_out" and noise.down > 0:
            return _apart(tensor, origin, noise, layer)
        if name == "router.weight" and noise.router > 0:
            return _drawn_apart(tensor, origin, noise, layer)
        copied = take(tensor, 0, origin)
        if name.endswith(".load"):  # shares, which go on to add up to one
            counts = torch.tensor([1.0 / origin.count(expert) for expert in origin])
            return LazyTensor(copied.shape, copied.dtype, lambda index: copied.read(index) * counts[index[0]])
        if name == "router.expert_bias" and whole and type(mixture.router.score).__name__ == "Softmax":
            return pointwise(copied, lambda bias: bias / times)  # beside probabilities that are so much smaller
        return copied

    return mixture.rebuilt(config, change)


def _router_values(mixture: Mixture, times: int, top_k: int | None) -> dict[str, Any]:
    """What the router's config must say for every token to take each of its experts `times` times."""
    router, given = mixture.router, mixture.stored.config["router"]
    if isinstance(router, ThresholdRouter):
        if top_k is not None:
            return {"max_experts": top_k}
        return {} if given.get("max_experts") is None else {"max_experts": router.max_experts * times}
    values = {"top_k": router.top_k * times if top_k is None else top_k, **mixture.meaning()}
    if given.get("eval_top_k") is not None:
        values["eval_top_k"] = router.eval_top_k * times
    if top_k is None and times > 1 and mixture.weights_sum is None and type(router.score).__name__ == "Sigmoid":
        values["scale"] = router.scale / times
    return values


def _apart(tensor: LazyTensor, origin: Sequence[int], noise: Noise, layer: int) -> LazyTensor:
    """Copies of each expert with noise that adds up to zero: (E, D, F) -> (E', D, F)."""
    made = []
    for number, expert in enumerate(origin):
        first, count = origin.index(expert), origin.count(expert)
        one = select(tensor, expert)
        made.append(one if count == 1 else _with_noise(one, number - first, count, noise, layer, expert))
    return stack(made)


def _with_noise(one: LazyTensor, copy: int, count: int, noise: Noise, layer: int, expert: int) -> LazyTensor:
    def fetch(index: Index) -> Tensor:
        whole = one.read().float()
        std = noise.down * _std(whole)
        drawn = [normal(whole.shape, std, noise.seed, layer, expert, "down", number) for number in range(count)]
        whole += drawn[copy] - torch.stack(drawn).mean(0)
        return whole[index].clone()

    return LazyTensor(one.shape, one.dtype, fetch)


def _drawn_apart(tensor: LazyTensor, origin: Sequence[int], noise: Noise, layer: int) -> LazyTensor:
    """Rows of the router, those of copies with noise: (E, D) -> (E', D)."""
    copied = take(tensor, 0, origin)

    def fetch(index: Index) -> Tensor:
        rows = copied.read().float()
        std = _std(rows)
        for number, expert in enumerate(origin):
            if origin.count(expert) > 1:
                rows[number] += normal(rows[number].shape, noise.router * std, noise.seed, layer, number, "router")
        return rows[index].clone()

    return LazyTensor(copied.shape, copied.dtype, fetch)


def _std(values: Tensor) -> float:
    """Of all entries, the same bits for any number of threads, which sum in parts of their own in torch."""
    return float(values.double().numpy().std())
