"""Pipelines folded with the other ways of cutting a model learn what one process learns, through the engine.

Four ranks are started once; they run all layouts and save what they found for the tests to compare.
"""

import sys
from pathlib import Path

import pytest
import torch
from meshes_of import meshes_of
from whole_tensors import whole

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.context import StepContext
from scatterfold.moe.sharding import sharding_plan
from scatterfold.moe.training.router_statistics import RouterStatistics
from scatterfold.parallel import Layout, Process
from scatterfold.parallel.engines import TorchEngine
from scatterfold.parallel.meshes import ALONE
from scatterfold.parallel.pipeline.torch_pipelining import can_split_backward
from scatterfold.parallel.process import barrier, running, sum_over_ranks

pytestmark = pytest.mark.distributed

ROWS, LENGTH, VOCAB, MICRO_BATCHES = 2, 16, 29, 4  # micro-batches of a step, over all data ranks
CONFIG = {
    "model": {
        "vocab_size": VOCAB,
        "layers": 5,
        "width": 16,
        "heads": 4,
        "kv_heads": 2,
        "ffn_width": 24,
        "expert_width": 8,
        "num_experts": 4,
        "first_k_dense": 1,
        "shared_expert_width": 8,
        "max_positions": LENGTH,
    },
    "router": {
        "_target_": "scatterfold.moe.routers.TopKRouter",
        "top_k": 2,
        "gate_bias": True,
        "balance_micro_batch": 0.0,
        "balance_sequence": 0.1,
        "z_loss": 0.05,
    },
    "experts": {"_target_": "scatterfold.moe.Experts"},
    "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
}
CASES = {
    "fsdp": (Layout(pp=2, dp_shard=2), {}),
    "fsdp, weights kept": (Layout(pp=2, dp_shard=2), {"reshard_after_forward": False}),
    "fsdp, interleaved": (Layout(pp=2, dp_shard=2), {"pipeline_schedule": "interleaved"}),
    "fsdp, zero_bubble": (Layout(pp=2, dp_shard=2), {"pipeline_schedule": "zero_bubble"}),
    "fsdp, zero_bubble_v": (Layout(pp=2, dp_shard=2), {"pipeline_schedule": "zero_bubble_v"}),
    "copies": (Layout(pp=2), {}),
    "ep": (Layout(pp=2, ep=2), {}),
    "ep, interleaved": (Layout(pp=2, ep=2), {"pipeline_schedule": "interleaved"}),
    "ep, zero_bubble": (Layout(pp=2, ep=2), {"pipeline_schedule": "zero_bubble"}),
    "fsdp x ep": (Layout(pp=2, dp_shard=2, ep=2), {}),
    "tp x ep": (Layout(pp=2, tp=2, ep=2), {}),
    "tp x ep, interleaved": (Layout(pp=2, tp=2, ep=2), {"pipeline_schedule": "interleaved"}),
    "tp x ep, zero_bubble": (Layout(pp=2, tp=2, ep=2), {"pipeline_schedule": "zero_bubble"}),
    "tp x etp": (Layout(pp=2, tp=2, etp=2), {}),
    "cp": (Layout(pp=2, cp=2), {}),
    "four stages": (Layout(pp=4), {}),
}


def prepare(process, meshes, precision="fp32", checkpointing="none", **options):
    plan, engine = ModelPlan.from_config(CONFIG), TorchEngine(**options)
    with torch.device("meta"):
        parts = plan.make_parts(engine.schedule, checkpointing, meshes)
    return engine.prepare(
        parts,
        lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
        process=process,
        meshes=meshes,
        plan=sharding_plan(parts),
        precision=precision,
        seed=5,
    )


def micro_batches(step, statistics=None, share=0, shares=1):
    """Those of one data rank; documents differ, and some targets are masked."""
    generator = torch.Generator().manual_seed(step)
    for index in range(MICRO_BATCHES):
        tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
        labels = tokens.roll(-1, dims=1).masked_fill(torch.rand(tokens.shape, generator=generator) < 0.2, -100)
        cuts = {0, LENGTH, ROWS * LENGTH, 1 + 3 * index % LENGTH, LENGTH + 2 + index % 7}
        if index % shares == share:
            yield {
                "tokens": tokens,
                "labels": labels,
                "cu_seqlens": torch.tensor(sorted(cuts), dtype=torch.int32) if index % 3 else None,
                "context": StepContext(ROWS, MICRO_BATCHES * tokens.numel(), statistics),
            }


def learn(engine, meshes):
    """Two steps of plain gradient descent and an evaluation."""
    statistics = RouterStatistics(ModelPlan.from_config(CONFIG).moe_layers, 4)
    place = meshes.data_rank, meshes.data_world
    found = {"loss": [], "norm": [], "counts": []}
    for step in range(2):
        loss = engine.run(list(micro_batches(step, statistics, *place)), 1 / 200)
        found["loss"].append(float(sum_over_ranks(loss.clone())))
        found["norm"].append(float(engine.clip(None)))
        found["counts"].append(statistics.reduce(sum_over_ranks).counts)
        found[f"gradients {step}"] = whole({name: p.grad for name, p in engine.named_parameters()})
        engine.step()
        engine.zero_grad()
    found["parameters"] = whole(dict(engine.named_parameters()))
    for part in engine.parts:
        part.eval()
    evaluated = [engine.evaluate(batch) for batch in micro_batches(7, None, *place)]
    found["evaluation"] = float(sum_over_ranks(torch.stack(evaluated).sum()))
    return found


def cases():
    for name, (layout, options) in CASES.items():
        if can_split_backward() or "zero_bubble" not in name:
            yield name, layout, options
    yield "bf16", Layout(pp=2, dp_shard=2), {"precision": "bf16"}
    if can_split_backward():
        yield "bf16, zero_bubble", Layout(pp=2, dp_shard=2), {"precision": "bf16", "pipeline_schedule": "zero_bubble"}
    yield "full", Layout(pp=2, dp_shard=2, ep=2), {"checkpointing": "full"}


def in_ranks(folder):
    with running("cpu", timeout_s=60) as process:
        found = {}
        for name, layout, options in cases():
            meshes = meshes_of(layout, process)
            found[name] = learn(prepare(process, meshes, **options), meshes)
        torch.save(found, Path(folder) / f"{process.rank}.pt")
        barrier()


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_ranks):
    """What each rank found, by the name of the case."""
    folder = tmp_path_factory.mktemp("layouts")
    run_ranks(4, __file__, "in_ranks", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.fixture(scope="module")
def alone():
    return {precision: learn(prepare(Process(), ALONE, precision=precision), ALONE) for precision in ("fp32", "bf16")}


@pytest.mark.parametrize("name", [name for name, _, _ in cases()])
def test_learns_what_one_process_learns(found, alone, name):
    there = alone["bf16" if name.startswith("bf16") else "fp32"]
    close = {"rtol": 1e-4, "atol": 1e-5}
    names = set()
    for rank in found:
        here = rank[name]
        for key in ("loss", "norm", "counts", "evaluation"):
            torch.testing.assert_close(here[key], there[key], **close, msg=lambda text, key=key: f"{key}: {text}")
        for key in ("gradients 0", "gradients 1", "parameters"):
            names |= here[key].keys()
            torch.testing.assert_close(here[key], {each: there[key][each] for each in here[key]}, **close)
    assert names == there["parameters"].keys()


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
