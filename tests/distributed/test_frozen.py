"""Frozen parameters and adapters over real layouts: what one process learns, every layout learns, and nothing more.

Each world is started once; its ranks run all cases and rank 0 saves what it found for the tests to compare.
"""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from meshes_of import meshes_of
from whole_tensors import whole

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.context import StepContext
from scatterfold.moe.models.frozen import is_frozen
from scatterfold.moe.sharding import sharding_plan
from scatterfold.moe.training.optimizers import AdamW
from scatterfold.parallel import Layout, Process
from scatterfold.parallel.checkpoint import Checkpointer, read_shapes
from scatterfold.parallel.engines import TorchEngine
from scatterfold.parallel.process import running, sum_over_ranks
from scatterfold.parallel.shards import local_part, local_range

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

SEQUENCES, LENGTH, VOCAB, STEPS = 4, 8, 29, 2
MODEL = {
    **{"vocab_size": VOCAB, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "max_positions": LENGTH},
    **{"expert_width": 8, "num_experts": 4, "shared_expert_width": 8},
}
EXPERTS = {"_target_": "scatterfold.moe.Experts"}
ADAPTERS = {"_target_": "scatterfold.moe.AdapterExperts", "adapter_width": 6, "alpha": 0.5}
DISPATCHERS = "scatterfold.parallel.dispatchers"
MODELS = {
    "first half": (["embedding.weight", "blocks.0.*"], EXPERTS),  # a whole stage of a pipeline of two
    "adapters": (["head.*", "*.attention.*", "*norm.weight", "blocks.1.mlp.router.*"], ADAPTERS),
    "adapters and their MLP": ([], {**ADAPTERS, "train_ffn": True}),
}
LAYOUTS = {
    2: {
        "ddp": Layout(),
        "fsdp": Layout(dp_shard=2),
        "ep": Layout(ep=2),
        "fsdp, ep": Layout(dp_shard=2, ep=2),
        "tp, ep": Layout(tp=2, ep=2),
        "tp, etp": Layout(tp=2, etp=2),
        "pp": Layout(pp=2),
        "cp": Layout(cp=2),
    },
    4: {"fsdp, tp, ep, etp": Layout(dp_shard=2, tp=2, ep=2, etp=2)},
}
SLOW = {"ep": "AllGatherDispatcher", "tp, etp": "AllGatherDispatcher"}  # the others exchange
NAMES = [name for world in LAYOUTS for name in LAYOUTS[world]]
CASES = [
    *((layout, "adapters") for layout in NAMES),
    *((layout, "first half") for layout in ("ddp", "fsdp", "fsdp, ep", "tp, ep", "pp")),
    *((layout, "adapters and their MLP") for layout in ("ep", "fsdp, ep", "tp, ep", "fsdp, tp, ep, etp")),
]
RESUMED = [*((name, "adapters") for name in ("ddp", "fsdp, ep", "tp, etp", "pp")), ("pp", "first half")]
OPTIMIZER = AdamW(lr=0.01, weight_decay=1.0, eps=1e-3)  # a small eps makes noise of gradients that are almost zero


def config_of(model, layout=None):
    frozen, experts = MODELS[model]
    return {
        "model": {**MODEL, "frozen": frozen},
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2, "z_loss": 0.01},
        "experts": experts,
        "dispatcher": {"_target_": f"{DISPATCHERS}.{SLOW.get(layout, 'AllToAllDispatcher')}"},
    }


def prepare(process, config, layout, precision="fp32", seed=0):
    plan, meshes, engine = ModelPlan.from_config(config), meshes_of(layout, process), TorchEngine()
    with torch.device("meta"):
        parts = plan.make_parts(engine.schedule, "none", meshes)
    engine = engine.prepare(
        parts,
        OPTIMIZER,
        process=process,
        meshes=meshes,
        plan=sharding_plan(parts),
        seed=seed,
        precision=precision,
    )
    disturb(engine)
    return engine


@torch.no_grad()
def disturb(engine):
    """Adapters that do something, the same in every layout."""
    for name, parameter in engine.named_parameters():
        if name.endswith(".adapters.w_out"):
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            held = [local_range(parameter, dim) for dim in range(parameter.ndim)]
            local_part(parameter).copy_(whole[tuple(slice(part.start, part.stop) for part in held)])


def learn(engine, steps=STEPS, start=0):
    meshes = engine.meshes
    found = {"loss": [], "norm": []}
    for step in range(start, start + steps):
        tokens = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step))
        own = tokens.chunk(meshes.data_world)[meshes.data_rank]
        context = StepContext(global_tokens=tokens.numel())
        arguments = [{"tokens": each, "labels": each.roll(-1, 1), "context": context} for each in own.split(1)]
        found["loss"].append(sum_over_ranks(engine.run(arguments, scale=1 / tokens.numel())))
        if step == start:
            gradients = {name: p.grad for name, p in engine.named_parameters() if p.grad is not None}
            found["gradients"] = whole(gradients)
            found["by_name"] = engine.grad_norms_by_parameter()
        found["norm"].append(engine.clip(1.0))
        engine.step()
        engine.zero_grad()
    return found


def results(process, model, layout, name=None):
    engine = prepare(process, config_of(model, name), layout)
    initial = whole(dict(engine.named_parameters()))
    return {**learn(engine), "initial": initial, "state": whole(engine.state_dict())}, engine


def in_ranks(folder):
    folder = Path(folder)
    with running("cpu", timeout_s=60) as process:
        for name, layout in LAYOUTS[process.world].items():
            for model in [model for of, model in CASES if of == name]:
                found, engine = results(process, model, layout, name)
                if (name, model) in RESUMED:
                    found["resumed"] = resume(process, engine, folder / f"{name}, {model}", layout, model, name)
                if model == "adapters":
                    found["bf16"] = learn(prepare(process, config_of(model, name), layout, precision="bf16"), 1)
                if process.is_main:
                    torch.save(found, folder / f"{name}, {model}.pt")


def resume(process, engine, folder, layout, model, name):
    """Whether a run that stopped goes on as one that did not."""
    Checkpointer(folder, process=process).save(STEPS, engine.state_dict(), {})
    on = learn(engine, 1, STEPS)
    again = prepare(process, config_of(model, name), layout, seed=1)
    again.load(folder / f"step-{STEPS}")
    resumed = learn(again, 1, STEPS)
    after, expected = whole(again.state_dict()), whole(engine.state_dict())
    same = after.keys() == expected.keys() and all(torch.equal(after[key], expected[key]) for key in after)
    return same and resumed["loss"] == on["loss"] and resumed["norm"] == on["norm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("frozen")
    for world in LAYOUTS:
        run_ranks(world, __file__, "in_ranks", folder)
    return folder


@pytest.fixture(scope="module")
def alone():
    return {model: results(Process(), model, Layout())[0] for model in MODELS}


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_learns_what_one_process_learns(folder, alone, layout, model):
    here, there = torch.load(folder / f"{layout}, {model}.pt"), alone[model]
    for key in ("loss", "norm", "gradients", "by_name", "initial", "state"):
        if isinstance(there[key], dict):
            assert here[key].keys() == there[key].keys()
        torch.testing.assert_close(here[key], there[key], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_what_is_frozen_stays_bit_equal_without_gradient_or_state(folder, layout, model):
    found = torch.load(folder / f"{layout}, {model}.pt")
    patterns, experts = MODELS[model]
    if experts is ADAPTERS:
        patterns = [*patterns, "*.experts.ffn.*"]
    names = found["initial"].keys()
    frozen = {name for name in names if is_frozen(name, patterns)}
    assert bool(frozen) == bool(patterns) and frozen < names
    with_state = {key.removeprefix("optimizer.").rpartition(".")[0] for key in found["state"] if key[0] == "o"}
    assert with_state == names - frozen == found["gradients"].keys()
    for name in names:
        assert torch.equal(found["state"][f"model.{name}"], found["initial"][name]) == (name in frozen), name


@pytest.mark.parametrize(("layout", "model"), RESUMED)
def test_a_run_goes_on_from_its_checkpoint(folder, layout, model):
    assert torch.load(folder / f"{layout}, {model}.pt")["resumed"]
    saved = read_shapes(folder / f"{layout}, {model}" / f"step-{STEPS}")
    frozen = MODELS[model][0]
    assert not any(
        is_frozen(name.removeprefix("optimizer.").rpartition(".")[0], frozen) for name in saved if name[0] == "o"
    )


@pytest.mark.parametrize("layout", NAMES)
def test_adapters_in_bfloat16_have_the_loss_of_one_process(folder, alone, layout):
    (here,), single = torch.load(folder / f"{layout}, adapters.pt")["bf16"]["loss"], alone["adapters"]["loss"][0]
    assert 0 < abs(here - single) / single < 2e-2


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
