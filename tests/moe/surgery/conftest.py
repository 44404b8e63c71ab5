"""Small stored models with routers that are sure of themselves."""

from pathlib import Path

import pytest
import torch

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.interop.stored import StoredModel, wanted_shapes
from scatterfold.parallel.checkpoint.lazy import in_memory

ROUTERS = "scatterfold.moe.routers"


def make(router=None, experts=None, tensors=None, seed=0, **model):
    """A model whose tensors are random numbers, its norms and router of a size that makes experts differ."""
    router = dict(router or {})
    if "threshold" in router:
        router["_target_"] = f"{ROUTERS}.ThresholdRouter"
    else:
        router = {"_target_": f"{ROUTERS}.TopKRouter", "top_k": 2, **router}
    config = {
        "model": {
            **{"vocab_size": 31, "layers": 2, "width": 16, "heads": 4, "ffn_width": 24, "expert_width": 12},
            **{"num_experts": 8, "max_positions": 32, **model},
        },
        "router": router,
        "experts": {"_target_": "scatterfold.moe.Experts", **(experts or {})},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
    }
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in wanted_shapes(ModelPlan.from_config(config)).items():
        std = 1.0 if len(shape) == 1 or name.endswith(("router.weight", "embedding.weight")) else shape[-1] ** -0.5
        values[name] = torch.randn(shape, generator=generator) * std
        if name.endswith(".load"):
            values[name] = values[name].softmax(0)
    values |= tensors or {}
    return StoredModel(Path("source"), "scatterfold", config, {name: in_memory(t) for name, t in values.items()})


@pytest.fixture
def stored():
    """`stored(router={…}, experts={…}, tensors={…}, **model)`: a stored model in memory."""
    return make


@pytest.fixture
def tokens():
    return torch.randint(0, 31, (3, 20), generator=torch.Generator().manual_seed(5))


def read(stored_model):
    return {name: tensor.read() for name, tensor in stored_model.tensors.items()}


@pytest.fixture
def values():
    """`values(stored)`: all its tensors."""
    return read


@pytest.fixture
def logits(tokens):
    """`logits(stored)`: of the module that is built of it, whole."""
    return lambda stored_model: stored_model.build()(tokens).detach()
