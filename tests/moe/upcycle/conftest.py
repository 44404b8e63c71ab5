"""Small dense models to upcycle, held in memory."""

from pathlib import Path

import pytest
import torch

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.interop.stored import StoredModel
from scatterfold.parallel.checkpoint import model_state
from scatterfold.parallel.checkpoint.lazy import in_memory

SIZES = {"vocab_size": 37, "layers": 2, "width": 16, "heads": 2, "ffn_width": 32}


@pytest.fixture
def make_dense():
    """A function that makes a dense model with random weights, as every format opens it."""

    def make(seed=0, **fields):
        config = {
            "model": {**SIZES, **fields},
            "router": {},
            "experts": {},
            "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
        }
        model = ModelPlan.from_config(config).make_model()
        model.reset_parameters(seed)
        tensors = {name.removeprefix("model."): in_memory(value) for name, value in model_state(model).items()}
        return StoredModel(Path(f"dense-{seed}"), "scatterfold", config, tensors)

    return make


@pytest.fixture
def logits():
    """A function that runs a stored model on the same few tokens."""
    tokens = torch.randint(SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def run(stored):
        return stored.build()(tokens)

    return run
