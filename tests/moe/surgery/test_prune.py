"""Pruning against experts removed by hand, and what it promises about combine weights."""

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.moe.surgery.mixture import Mixture
from scatterfold.moe.surgery.operations import Prune
from scatterfold.moe.surgery.prune import most_used, prune
from scatterfold.moe.surgery.usage import Usage

KEPT = {0: [1, 2, 4, 7], 1: [0, 3, 4, 5]}
EXACT = {
    "renormalised": {},
    "sigmoid": {"score": "sigmoid", "renormalise": False, "scale": 1.7},
    "sigmoid, renormalised, biased": {"score": "sigmoid", "bias_rate": 0.001},
    "after": {"score": "softmax_after"},
    "threshold": {"_target_": "scatterfold.moe.routers.ThresholdRouter", "threshold": 0.6, "renormalise": True},
}


def unchosen(layer):
    """A router bias by which only the kept experts are ever chosen."""
    return torch.tensor([0.0 if expert in KEPT[layer] else -60.0 for expert in range(8)])


@pytest.mark.parametrize("name", EXACT)
def test_experts_that_nobody_chooses_leave_without_a_trace(stored, logits, values, name):
    router = {"gate_bias": True, "balance_global_batch": 0.1, **EXACT[name]}
    if "threshold" in name:
        router.pop("top_k", None)
    source = make_source(stored, router)
    result = prune(Mixture.of(source), KEPT)
    torch.testing.assert_close(logits(result), logits(source), rtol=1e-5, atol=1e-5)
    before, after = values(source), values(result)
    for key, value in after.items():
        runs = ".router." in key or ".experts." in key
        expected = before[key][KEPT[int(key.split(".")[1])]] if runs else before[key]
        assert torch.equal(value, expected), key


def make_source(stored, router):
    target = router.get("_target_", "")
    node = {"router": router} if "Threshold" not in target else {"router": {**router, "top_k": None}}
    if "Threshold" in target:
        node["router"].pop("top_k")
        source = stored_threshold(stored, node["router"])
    else:
        source = stored(**node)
    tensors = {f"blocks.{layer}.mlp.router.bias": unchosen(layer) for layer in (0, 1)}
    from scatterfold.parallel.checkpoint.lazy import in_memory

    return source.with_model(source.config, {**source.tensors, **{k: in_memory(v) for k, v in tensors.items()}})
