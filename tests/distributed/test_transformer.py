"""The real model over real layouts: what one process learns, every layout learns, and reads from every checkpoint."""

import sys
import time
from pathlib import Path

import pytest
import torch
from meshes_of import meshes_of
from whole_tensors import holds, same, whole

from scatterfold.kernels import CheckpointError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.context import StepContext
from scatterfold.moe.sharding import sharding_plan
from scatterfold.moe.training.optimizers import AdamW
from scatterfold.moe.training.router_statistics import RouterStatistics
from scatterfold.parallel import Layout, Process
from scatterfold.parallel.checkpoint import (
    Checkpointer,
    checkpointer,
    load,
    model_state,
    newest_checkpoint,
    open_checkpoint,
)
from scatterfold.parallel.engines import TorchEngine
from scatterfold.parallel.process import barrier, broadcast, gather, running, sum_over_ranks
from scatterfold.parallel.shards import local_part

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

SEQUENCES, LENGTH, VOCAB, EXPERTS, STEPS = 8, 16, 29, 4, 3
CONFIG = {
    "model": {
        "vocab_size": VOCAB,  # odd: tp cuts it into unequal parts
        "layers": 2,  # one dense, one of experts: a pipeline of two has all its experts on one stage
        "width": 16,
        "heads": 4,
        "kv_heads": 2,
        "ffn_width": 24,
        "expert_width": 8,
        "num_experts": EXPERTS,
        "shared_expert_width": 8,
        "first_k_dense": 1,
        "qk_norm": "head",
        "max_positions": LENGTH,
    },
    "router": {
        "_target_": "scatterfold.moe.routers.TopKRouter",
        "top_k": 2,
        "balance_micro_batch": 0.0,
        "balance_sequence": 0.01,
        "z_loss": 0.001,
        "bias_rate": 0.01,
    },
    "experts": {"_target_": "scatterfold.moe.Experts", "bias": True},
    "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
}
LAYOUTS = {
    2: {"ddp": Layout(), "fsdp": Layout(dp_shard=2), "tp, ep": Layout(tp=2, ep=2)},
    4: {
        "fsdp of 4": Layout(dp_shard=4),
        "hsdp": Layout(2, 2),
        "ep": Layout(ep=4),
        "ep, copies": Layout(ep=2),
        "hsdp, ep": Layout(2, 2, ep=2),
        "fsdp, ep": Layout(dp_shard=4, ep=2),
        "fsdp, ep over all": Layout(dp_shard=4, ep=4),
        "ep, etp": Layout(ep=2, etp=2),
        "fsdp, etp": Layout(dp_shard=4, etp=2),
        "fsdp, tp, ep": Layout(dp_shard=2, tp=2, ep=2),
        "fsdp, tp, ep over both": Layout(dp_shard=2, tp=2, ep=4),
        "cp, tp, ep": Layout(cp=2, tp=2, ep=2),
        "fsdp, cp, ep over both": Layout(dp_shard=2, cp=2, ep=4),
        "pp, ep": Layout(pp=2, ep=2),
        "pp, tp, ep": Layout(tp=2, pp=2, ep=2),
    },
    8: {
        "pp, fsdp, tp, ep": Layout(dp_shard=2, tp=2, pp=2, ep=4),
        "hsdp, cp, ep, etp": Layout(2, 2, cp=2, ep=2, etp=2),
        "fsdp, cp, tp, experts over all": Layout(dp_shard=2, cp=2, tp=2, ep=4, etp=2),
    },
}
NAMES = [(world, name) for world in LAYOUTS for name in LAYOUTS[world]]
# Who saves and resumes, and reads what all others of them wrote.
WRITERS = {
    2: ["ddp", "fsdp", "tp, ep"],
    4: ["fsdp of 4", "hsdp", "fsdp, ep", "fsdp, tp, ep", "pp, ep"],
    8: ["pp, fsdp, tp, ep"],
}
WORLDS = {name: world for world in WRITERS for name in WRITERS[world]} | {"alone": 1}
SOURCES = ["alone", *WRITERS[8], *WRITERS[4], *WRITERS[2]]
# The format knows no layout, so what the others read of these sources is what one process and eight wrote.
READS_ALL = ["tp, ep", "pp, ep"]


def sgd(model):
    """Of rate 1, so that a wrong factor of a gradient, which Adam would not feel, is a wrong weight."""
    return torch.optim.SGD(model.parameters(), lr=1.0)


OPTIMIZERS = {"sgd": sgd, "adamw": AdamW(lr=0.01)}


def prepare(process, layout, optimizer="adamw", seed=0, checkpointing="none", **options):
    plan, meshes, engine = ModelPlan.from_config(CONFIG), meshes_of(layout, process), TorchEngine()
    with torch.device("meta"):
        parts = plan.make_parts(engine.schedule, checkpointing, meshes)
    make = OPTIMIZERS[optimizer]
    return engine.prepare(parts, make, process=process, meshes=meshes, plan=sharding_plan(parts), seed=seed, **options)


def learn(engine, steps=STEPS, start=0, size=None):
    """A few optimizer steps: losses, norms and counts, first gradients, and the loss of an evaluation.

    With SGD two micro-batches per rank, with AdamW one where there is no pipeline to fill, or as many as there are with
    `size` sequences: each gradient of a micro-batch is rounded to bfloat16 there, so only equal ones have equal
    gradients.
    """
    meshes = engine.meshes
    layers = [layer for part in engine.parts for layer in part.moe_layers()]
    statistics = RouterStatistics([1], EXPERTS, gather=gather)
    micro_batches = 1 if isinstance(engine.optimizer, torch.optim.AdamW) and meshes.pp is None else 2
    found = {"loss": [], "norm": [], "counts": [], "aux": [], "gradients": []}
    for step in range(start, start + steps):
        tokens = (
            torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step)) ** 2 % VOCAB
        )
        own = tokens.chunk(meshes.data_world)[meshes.data_rank]
        context = StepContext(global_tokens=tokens.numel(), statistics=statistics)
        batches = own.chunk(micro_batches) if size is None else own.split(size)
        arguments = [{"tokens": batch, "labels": batch.roll(-1, 1), "context": context} for batch in batches]
        found["loss"].append(sum_over_ranks(engine.run(arguments, scale=1 / tokens.numel())))
        if step == start:
            found["gradients"].append(whole({name: p.grad for name, p in engine.named_parameters()}))
            found["by_name"] = engine.grad_norms_by_parameter()
        found["norm"].append(engine.clip(1.0))
        reduced = statistics.reduce(sum_over_ranks)
        found["counts"].append(reduced.counts)
        found["aux"].append(reduced.losses)
        for index, layer in layers:
            layer.router.finish_step(reduced.counts[reduced.layers.index(index)])
        engine.step()
        engine.zero_grad()
    batch = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCAB
    shares = engine.evaluate({"tokens": batch, "labels": batch.roll(-1, 1)})
    found["evaluation"] = sum_over_ranks(shares) / meshes.data_world
    return found


def whole_state(engine):
    return whole(engine.state_dict())


def weights(engine):
    return whole(model_state(*engine.parts))


def in_ranks(folder):
    """Each layout learns; some write a checkpoint, go on, read it again, and learn the same once more."""
    folder = Path(folder)
    with running("cpu", timeout_s=60) as process:
        for name, layout in LAYOUTS[process.world].items():
            found, began = {}, time.monotonic()
            engine = prepare(process, layout, "sgd")
            found["initial"] = weights(engine)
            found["sgd"], found["sgd weights"] = learn(engine), weights(engine)
            engine = prepare(process, layout)
            found["adamw"], found["adamw weights"] = learn(engine), weights(engine)
            if name in WRITERS[process.world]:
                found["bf16"] = learn(prepare(process, layout, precision="bf16"), 1, size=1)
                write(folder / name, engine, found, process, layout)
            if process.is_main:
                print(name, time.monotonic() - began, flush=True)
                torch.save(found, folder / f"{name}.pt")
        if process.world == 2:
            fail(folder / "failing", process)
        for name in WRITERS[process.world]:
            for source in SOURCES if name in READS_ALL else SOURCES[:2]:
                if broadcast((folder / source).exists()):
                    engine = prepare(process, LAYOUTS[process.world][name], seed=1)
                    read(folder / source, engine, process, apart=name in READS_ALL and source in SOURCES[:2])
                    barrier()
                    if process.is_main:
                        (folder / f"{name} read {source}").touch()


def write(folder, engine, found, process, layout):
    keep = Checkpointer(folder, process=process, asynchronous="fsdp" in folder.name)
    keep.save(STEPS, engine.state_dict(), {})
    saved = whole_state(engine)
    if process.is_main:
        torch.save(saved, folder.with_name(f"{folder.name} state.pt"))
    found["after"] = learn(engine, 2, STEPS)["loss"]
    keep.wait()
    resumed = prepare(process, layout, seed=1, checkpointing="selective")
    resumed.load(folder / f"step-{STEPS}")
    holds(resumed.state_dict(), saved)
    found["resumed"] = learn(resumed, 2, STEPS)["loss"]
    same(whole_state(resumed), whole_state(engine))


def read(folder, engine, process, apart):
    """Model and optimizer from what any layout wrote; first one after the other, if `apart`."""
    newest = broadcast(newest_checkpoint(folder))
    state = torch.load(folder.with_name(f"{folder.name} state.pt"))
    if apart:
        engine.load_weights(open_checkpoint(newest, "model."), newest)
        assert not engine.optimizer.state
        model = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
        holds(model_state(*engine.parts), model)
        engine.load_optimizer(open_checkpoint(newest, "optimizer."), newest)
        holds(engine.state_dict(), state)
        for tensor in engine.state_dict().values():
            local_part(tensor).zero_()
    engine.load(newest)
    holds(engine.state_dict(), state)
    if folder.name != "alone":
        return
    losses = learn(engine, 2, STEPS)["loss"]
    if process.is_main:
        expected = torch.load(folder.with_name("alone.pt"))["after"]
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)


def fail(folder, process):
    """What goes wrong on one rank is raised on all, with the old checkpoint as it was."""
    engine = prepare(process, LAYOUTS[2]["fsdp"])
    keep = Checkpointer(folder, process=process)
    keep.save(1, engine.state_dict(), {})
    state = engine.state_dict()
    original = checkpointer.FileSystemWriter.write_data, checkpointer.checksum

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for place in ("write_data", "checksum"):
        owner = checkpointer.FileSystemWriter if place == "write_data" else checkpointer
        before = getattr(owner, place)
        if process.rank == 1:
            setattr(owner, place, full_disk)
        with pytest.raises(CheckpointError, match="step-2 could not be written: No space left on device"):
            keep.save(2, state, {})
        setattr(owner, place, before)
        barrier()
        assert [path.name for path in folder.iterdir()] == ["step-1"]
    assert (checkpointer.FileSystemWriter.write_data, checkpointer.checksum) == original
    if process.is_main:
        file = sorted((folder / "step-1").glob("__1_*"))[0]
        content = bytearray(file.read_bytes())
        content[-200] ^= 1
        file.write_bytes(content)
    barrier()
    with pytest.raises(CheckpointError, match="__1_0.distcp is damaged: its checksum is"):
        engine.load(folder / "step-1")
    assert not engine.optimizer.state


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("layouts")
    found = {}
    engine = prepare(Process(), Layout(), "sgd")
    found["initial"] = weights(engine)
    found["sgd"], found["sgd weights"] = learn(engine), weights(engine)
    engine = prepare(Process(), Layout())
    found["adamw"], found["adamw weights"] = learn(engine), weights(engine)
    Checkpointer(folder / "alone", process=Process()).save(STEPS, engine.state_dict(), {})
    torch.save(whole_state(engine), folder / "alone state.pt")
    found["after"] = learn(engine, 2, STEPS)["loss"]
    found["bf16"] = learn(prepare(Process(), Layout(), precision="bf16"), 1, size=1)
    torch.save(found, folder / "alone.pt")
    for world in (8, 4, 2):  # the fewer read what the more wrote
        run_ranks(world, __file__, "in_ranks", folder)
    return folder


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_layout_learns_what_one_process_learns(folder, world, name):
    here, there = torch.load(folder / f"{name}.pt"), torch.load(folder / "alone.pt")
    same(here["initial"], there["initial"])
    for optimizer in ("sgd", "adamw"):
        torch.testing.assert_close(here[optimizer], there[optimizer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(here[f"{optimizer} weights"], there[f"{optimizer} weights"], rtol=1e-4, atol=1e-5)
    assert list(here["sgd"]["by_name"]) == list(there["sgd"]["by_name"])


def test_the_layers_load_their_experts_unevenly(folder):
    """Otherwise, the tests above could not tell experts apart."""
    counts = torch.stack(torch.load(folder / "alone.pt")["sgd"]["counts"])
    assert (counts.max(-1).values > 1.3 * counts.mean(-1)).all()


@pytest.mark.parametrize("name", ["fsdp, ep", "tp, ep", "fsdp, tp, ep", "pp, ep"])
def test_bf16_differs_by_the_rounding_of_partial_sums(folder, name):
    """Several ranks each round their part of a token's sum over experts or channels."""
    here, there = torch.load(folder / f"{name}.pt")["bf16"], torch.load(folder / "alone.pt")
    torch.testing.assert_close(here["loss"], there["bf16"]["loss"], rtol=2e-3, atol=0)
    torch.testing.assert_close(here["norm"], there["bf16"]["norm"], rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp of 4", "hsdp"])
def test_bf16_is_the_same_in_every_layout_that_cuts_no_sum(folder, name):
    here, there = torch.load(folder / f"{name}.pt")["bf16"], torch.load(folder / "alone.pt")["bf16"]
    torch.testing.assert_close(here["loss"], there["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(here["gradients"], there["gradients"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for world in WRITERS for name in WRITERS[world]])
def test_resume_is_exact_and_so_is_recomputation(folder, name):
    """Those that resume compute activations twice. Here are losses; the ranks have compared every bit of the state."""
    found = torch.load(folder / f"{name}.pt")
    assert found["after"] == found["resumed"]


@pytest.mark.parametrize("name", SOURCES)
def test_one_process_reads_every_layout(folder, name):
    state = torch.load(folder / f"{name} state.pt")
    engine = prepare(Process(), Layout(), seed=1)
    engine.load(folder / name / f"step-{STEPS}")
    same(engine.state_dict(), state)
    torch.testing.assert_close(
        learn(engine, 2, STEPS)["loss"], torch.load(folder / "alone.pt")["after"], rtol=1e-4, atol=0
    )
    model = ModelPlan.from_config(CONFIG).make_model()
    load(folder / name / f"step-{STEPS}", model_state(model))
    same(model_state(model), {name: tensor for name, tensor in state.items() if name.startswith("model.")})


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (name, source)
        for world in WRITERS
        for name in WRITERS[world]
        for source in (SOURCES if name in READS_ALL else SOURCES[:2])
        if not 1 < WORLDS[source] < world
    ],
)
def test_every_layout_reads_the_others(folder, name, source):
    """The ranks have compared every bit, and failed if one differed; more ranks ran before fewer had written."""
    assert (folder / f"{name} read {source}").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
