"""AdamW's moments of a dense model, carried over to the MoE that it becomes.

A weight that is k times what it was has gradients of 1/k: its first moment goes with 1/k and its second with 1/k^2, so
AdamW's step keeps its size (whatever k, since it is m / sqrt(v)). What is new, such as the router, begins at zero with
its own count of steps, so that the bias correction fits. An expert sees a part of the tokens, with weights below one,
so its gradients are smaller than those that the second moment remembers, and its first steps are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from ...kernels import ConfigError
from ...parallel.checkpoint.lazy import LazyTensor, constant
from ..interop.stored import StoredModel
from .matrices import Matrices

if TYPE_CHECKING:
    from .method import Method

# How the state of a weight changes when the weight is multiplied by k: by k to this power.
MOMENTS = {".exp_avg": -1, ".exp_avg_sq": -2, ".max_exp_avg_sq": -2}
STEP = ".step"


def carried_state(source: StoredModel, result: StoredModel, method: Method) -> dict[str, LazyTensor]:
    """The state of the result's optimizer.

    Raises: ConfigError if the source has none, or one of another optimizer than AdamW, or values were drawn anew.
    """
    if not source.optimizer:
        raise ConfigError(
            f"optimizer=carry, but {source.source} holds no optimizer state, allowed: reset, or a checkpoint of a run"
        )
    if method.sources > 1 or method.settings.method == "drop":
        raise ConfigError(
            f"optimizer=carry does not fit method={method.settings.method}: its weights are not those that the moments "
            "belong to, allowed: reset"
        )
    suffixes = _suffixes(source.optimizer)
    state: dict[str, LazyTensor] = {}
    for layer in method.layers:
        prefix = f"blocks.{layer}.mlp."
        if f"{prefix}w_up.weight{STEP}" not in source.optimizer:
            continue  # it was frozen
        for suffix in suffixes:
            mlp = Matrices.of(source.optimizer, prefix, suffix)
            moments = method.moments([mlp], layer, suffix, MOMENTS[suffix])
            steps = source.optimizer[f"{prefix}w_up.weight{STEP}"]
            for name, moment in moments.items():
                state[f"{prefix}{name}"] = moment
                state[f"{prefix}{name.removesuffix(suffix)}{STEP}"] = steps
    for name in _trained(result):
        for suffix in (*suffixes, STEP):
            if f"{name}{suffix}" not in state:
                state[f"{name}{suffix}"] = _kept_or_new(source, result, name, suffix)
    return state


def _kept_or_new(source: StoredModel, result: StoredModel, name: str, suffix: str) -> LazyTensor:
    """The state as it was, of a parameter that the source trained too; else zeros."""
    kept = source.optimizer.get(f"{name}{suffix}")
    shape = () if suffix == STEP else result.tensors[name].shape
    return constant(0.0, shape, torch.float32) if kept is None else kept


def _suffixes(state: Iterable[str]) -> list[str]:
    """Which moments there are, as ends of names. Raises: ConfigError for what AdamW does not have."""
    found = {f".{name.rpartition('.')[2]}" for name in state}
    unknown = sorted(found - {*MOMENTS, STEP})
    if unknown or ".exp_avg" not in found or STEP not in found:
        shown = unknown[0].removeprefix(".") if unknown else "no exp_avg and step"
        raise ConfigError(f"optimizer=carry: the source's optimizer state has {shown}, allowed: AdamW's, or reset")
    return [suffix for suffix in MOMENTS if suffix in found]


def _trained(result: StoredModel) -> list[str]:
    with torch.device("meta"):
        parameters: Mapping[str, torch.nn.Parameter] = dict(result.plan().make_model().named_parameters())
    return [name for name, parameter in parameters.items() if parameter.requires_grad]
