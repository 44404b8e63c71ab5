"""Megatron-Core in this process, on its CPU, for all tests of a module."""

import contextlib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROUTER = {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2}
MODEL = {
    "vocab_size": 64,
    "layers": 3,
    "width": 16,
    "heads": 4,
    "kv_heads": 2,
    "ffn_width": 12,
    "expert_width": 8,
    "num_experts": 8,
    "moe_layers": [1, 2],
    "max_positions": 24,
}
EXPERTS = {"_target_": "scatterfold.moe.experts.Experts"}


def make_plan(model=None, router=None, experts=None):
    from scatterfold.moe.build import ModelPlan

    config = {
        "model": {**MODEL, **(model or {})},
        "router": router if "_target_" in (router or {}) else {**ROUTER, **(router or {})},
        "experts": {**EXPERTS, **(experts or {})},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
    }
    return ModelPlan.from_config(config)


@pytest.fixture(scope="session")
def plan_of():
    return make_plan


@pytest.fixture(scope="session")
def base_model():
    return MODEL


@pytest.fixture(scope="module")
def tools():
    """Those of the tests that read and write Megatron's checkpoints."""
    pytest.importorskip("megatron.core")
    file = Path(__file__).parents[1] / "interop/megatron/conftest.py"
    spec = spec_from_file_location("conftest_of_megatron", file)
    tools = module_from_spec(spec)
    spec.loader.exec_module(tools)
    return tools


@pytest.fixture(scope="module")
def megatron(tools):
    """Megatron's groups, all of one rank."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        tools.patch_for_cpu(patch)
        torch.compiler.set_stance("force_eager")
        stack.callback(torch.compiler.set_stance, "default")
        yield stack.enter_context(tools.ranks(dist.HashStore(), 0, 1))
