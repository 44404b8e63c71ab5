"""The configuration of which an estimate is made, composed as `scatterfold train` composes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...kernels.errors import ConfigError
from ...moe.estimate import SIZES
from ...moe.training.run_plan import RunPlan
from ..composition import session
from ..request import Request
from ..train import checked


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration. Raises: ConfigError for what is not one configuration."""
    request = Request.parse(overrides)
    if request.multirun or request.show is not None:
        raise ConfigError("plan takes one configuration, allowed: key=value without -m and -c")
    with session(request) as hydra:
        config = checked(hydra.resolve(hydra.compose()), request)
    data = dict(config["data"])
    if data.get("path") is None:
        data["path"] = "stdlib"  # experiments leave it to the user; no data is read
    return {**config, "data": data}


def read(config: dict[str, Any]) -> RunPlan:
    """The checked configuration. Raises: ConfigError."""
    return RunPlan.from_config(config)


def given_sizes(overrides: Sequence[str], plan: RunPlan) -> dict[str, int]:
    """Sizes of the layout that the user typed: the search keeps them."""
    request = Request.parse(overrides)
    typed = [name for name in SIZES if request.value_of(f"layout.{name}") not in (None, "null")]
    return {name: getattr(plan.layout, name) for name in typed}
