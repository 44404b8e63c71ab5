"""Small jobs for tests of estimates, from plain mappings as a config file gives them."""

from scatterfold.moe.estimate import Job, Workload
from scatterfold.moe.training.run_plan import RunPlan
from scatterfold.parallel import Layout

MODEL = {
    "vocab_size": 260,
    "layers": 2,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "expert_width": 16,
    "ffn_width": 24,
    "num_experts": 4,
    "max_positions": 64,
}
ROUTER = {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2, "balance_micro_batch": 0.01, "z_loss": 0.001}
DATA = {"sequence_length": 32, "global_batch_size": 8, "pack_documents": False}


def config(model=None, data=None, trainer=None, engine=None, dispatcher=None, layout=None, router=None, experts=None):
    """A resolved configuration with these changes; `dispatcher` may be a whole node."""
    return {
        "seed": 0,
        "model": {**MODEL, **(model or {})},
        "router": {**ROUTER, **(router or {})},
        "experts": {"_target_": "scatterfold.moe.Experts", **(experts or {})},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher", **(dispatcher or {})},
        "data": {**DATA, **(data or {})},
        "optimizer": {"_target_": "scatterfold.moe.training.AdamW", "lr": 0.001},
        "schedule": {"_target_": "scatterfold.moe.training.Constant"},
        "trainer": {"steps": 1, "device": "cpu", **(trainer or {})},
        "engine": {"_target_": "scatterfold.parallel.engines.TorchEngine", **(engine or {})},
        "layout": layout or {},
    }


def workload(device_type="cpu", **changes):
    return Workload.of(RunPlan.from_config(config(**changes)), device_type)


def job(world=1, **changes):
    """The job of a configuration over so many ranks; its layout is legal, or this raises."""
    found = workload(**changes)
    return Job(found, found.resolve(Layout(**changes.get("layout", {})), world))
