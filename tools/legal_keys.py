"""The keys that the classes of a configuration take, whether or not a YAML file mentions them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

# Groups whose class is fixed, so that their files need no `_target_`.
FIXED = {
    "model": "scatterfold.moe.models.config.ModelConfig",
    "data": "scatterfold.moe.data.DataSettings",
    "trainer": "scatterfold.moe.training.settings.TrainerSettings",
    "logger": "scatterfold.moe.training.settings.LoggerSettings",
    "layout": "scatterfold.parallel.layout.Layout",
    "communication": "scatterfold.parallel.communication.settings.CommunicationSettings",
}
# What the model gives to its parts; an override may not.
SUPPLIED = {"router": ("width", "num_experts"), "experts": ("num_experts", "width", "expert_width")}


def parameters_of(config: Mapping[str, Any]) -> set[str]:
    """`group.parameter` for every parameter of the classes that the groups name."""
    found = set()
    for group, node in config.items():
        if not isinstance(node, Mapping):
            continue
        target = node.get("_target_") or FIXED.get(group)
        if target is not None:
            names = _parameters(str(target)) - set(SUPPLIED.get(group, ()))
            found.update(f"{group}.{name}" for name in names)
    return found


@cache
def _parameters(target: str) -> frozenset[str]:
    module, _, name = target.rpartition(".")
    try:
        signature = inspect.signature(getattr(import_module(module), name))
    except (ImportError, AttributeError, ValueError, TypeError):
        return frozenset()  # a wrong `_target_` is reported where it is built
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(name for name, parameter in signature.parameters.items() if parameter.kind in kinds)
