"""Every router of configs/router builds, and lists all that can be set."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml

from scatterfold.moe.components import build
from scatterfold.moe.context import StepContext
from scatterfold.moe.routers import ThresholdRouter, TopKRouter

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "router"


def load(name):
    """The node as Hydra composes it: the named default first, then the file's own keys."""
    node = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    merged = {}
    for default in node.pop("defaults", []):
        if default != "_self_":
            merged.update(load(default))
    return {**merged, **node}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_builds_and_routes(name):
    router = build(load(name), "router", width=8, num_experts=8)
    routed = router(torch.randn(32, 8), StepContext(num_sequences=2))
    assert routed.counts.sum() >= 32
    assert set(routed.losses) == set(router.losses)


@pytest.mark.parametrize(("name", "kind"), [("top_k", TopKRouter), ("threshold", ThresholdRouter)])
def test_every_argument_can_be_overridden(name, kind):
    arguments = set(inspect.signature(kind).parameters) - {"width", "num_experts"}
    assert set(load(name)) == arguments | {"_target_"}


def test_variants_are_what_they_are_named_for():
    v3, switch, qwen = load("sigmoid_bias"), load("switch"), load("global_balance")
    assert (v3["score"], v3["bias_rate"], v3["balance_micro_batch"]) == ("sigmoid", 0.001, 0.0)
    assert (switch["top_k"], switch["capacity_factor"]) == (1, 1.25)
    assert (qwen["balance_global_batch"], qwen["balance_micro_batch"]) == (0.01, 0.0)
