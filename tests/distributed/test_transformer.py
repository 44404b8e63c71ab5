"""The real model over real layouts: the same loss and gradients, and checkpoints that any layout reads."""

import sys
from pathlib import Path

import pytest
import torch

from scatterfold.kernels import CheckpointError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.context import StepContext
from scatterfold.moe.training.optimizers import AdamW
from scatterfold.parallel import Layout, Process
from scatterfold.parallel.checkpoint import Checkpointer, checkpointer, load_weights, model_state, newest_checkpoint
from scatterfold.parallel.engines import TorchEngine
from scatterfold.parallel.process import barrier, broadcast, running, sum_over_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

SEQUENCES, LENGTH, VOCAB = 8, 16, 29
CONFIG = {
    "model": {
        "vocab_size": VOCAB,
        "layers": 2,
        "width": 16,
        "heads": 2,
        "kv_heads": 1,
        "ffn_width": 24,
        "expert_width": 8,
        "num_experts": 5,
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
    },
    "experts": {"_target_": "scatterfold.moe.Experts"},
    "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
}
LAYOUTS = {"alone": Layout(), "ddp": Layout(), "fsdp": Layout(dp_shard=2), "hsdp": Layout(2, 2)}


def prepare(process, layout, seed=0, **options):
    plan = ModelPlan.from_config(CONFIG)
    with torch.device("meta"):
        model = plan.make_model(options.pop("checkpointing", "none"))
    return TorchEngine().prepare(
        model,
        AdamW(lr=0.01),
        process=process,
        layout=layout,
        units=model.sharding_units(),
        float32=[layer.router for _, layer in model.moe_layers()],
        seed=seed,
        **options,
    )


def learn(engine, process, steps, start=0, size=None):
    """A few optimizer steps; the losses, gradient norms and first gradients.

    Two micro-batches per rank, or as many as there are with `size` sequences: each gradient of a micro-batch is rounded
    to bfloat16 there, so only equal micro-batches have equal gradients.
    """
    found = {"loss": [], "norm": []}
    for step in range(start, start + steps):
        tokens = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step))
        own = tokens[process.rank :: process.world]
        micro_batches = own.chunk(2) if size is None else own.split(size)
        total = torch.zeros(())
        for index, batch in enumerate(micro_batches):
            context = StepContext(num_sequences=len(batch), global_tokens=tokens.numel())
            with engine.forward_context(last_micro_batch=index == len(micro_batches) - 1):
                loss = engine.model(batch, batch.roll(-1, dims=1), context=context) / tokens.numel()
            engine.backward(loss)
            total += loss.detach()
        if "gradients" not in found:
            found["gradients"] = {name: whole(p.grad) for name, p in engine.module.named_parameters()}
        found["loss"].append(sum_over_ranks(total))
        found["norm"].append(engine.clip(1.0))
        engine.step()
        engine.zero_grad()
    return found


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def whole_state(engine):
    return {name: whole(tensor) for name, tensor in engine.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def layouts_of(world):
    return {2: ["ddp", "fsdp"], 4: ["hsdp"]}[world]


def write_in_ranks(folder):
    """Each layout: two steps, a checkpoint, two more steps; then the checkpoint again and the same two steps."""
    folder = Path(folder)
    with running("cpu", timeout_s=60) as process:
        for name in layouts_of(process.world):
            engine = prepare(process, LAYOUTS[name])
            found = learn(engine, process, 2)
            with torch.no_grad(), engine.evaluation_context():  # leaves gathered parameters behind
                engine.model(torch.zeros(1, LENGTH, dtype=torch.int64))
            keep = Checkpointer(folder / name, process=process, asynchronous=name == "fsdp")
            keep.save(2, engine.state_dict(), {"layout": name})
            saved = whole_state(engine)
            found["after"] = learn(engine, process, 2, start=2)["loss"]
            keep.wait()
            resumed = prepare(process, LAYOUTS[name], seed=1)
            resumed.load(folder / name / "step-2")
            same(whole_state(resumed), saved)
            found["resumed"] = learn(resumed, process, 2, start=2)["loss"]
            same(whole_state(resumed), whole_state(engine))
            recomputing = prepare(process, LAYOUTS[name], checkpointing="selective")
            found["recomputed"] = learn(recomputing, process, 1)
            found["bf16"] = learn(prepare(process, LAYOUTS[name], precision="bf16"), process, 1, size=1)
            if process.is_main:
                torch.save({"state": saved, "found": found}, folder / f"{name}.pt")
        if process.world == 2:
            fail_in_ranks(folder / "failing", process)
            read_in_ranks(folder, process)


def fail_in_ranks(folder, process):
    """What goes wrong on one rank is raised on all, with the old checkpoint as it was."""
    engine = prepare(process, LAYOUTS["fsdp"])
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


def read_in_ranks(folder, process):
    """What one process and every layout wrote, read by the layouts of this world."""
    read = []
    for name in layouts_of(process.world):
        for source in LAYOUTS:
            newest = broadcast(newest_checkpoint(folder / source))
            engine = prepare(process, LAYOUTS[name], seed=1)
            engine.load(newest)
            same(whole_state(engine), torch.load(folder / f"{source}.pt")["state"])
            fresh = prepare(process, LAYOUTS[name], seed=1)
            fresh.load_weights(newest)
            assert not fresh.optimizer.state
            same(whole_state(fresh), {k: v for k, v in whole_state(engine).items() if k.startswith("model.")})
            read.append((name, source))
    if process.is_main:
        torch.save(read, folder / "read.pt")


@pytest.fixture(scope="module")
def alone():
    engine = prepare(Process(), Layout())
    return engine, learn(engine, Process(), 2), whole_state(engine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_ranks, alone):
    folder = tmp_path_factory.mktemp("layouts")
    engine, _, state = alone
    Checkpointer(folder / "alone", process=Process()).save(2, engine.state_dict(), {})
    torch.save({"state": state}, folder / "alone.pt")
    for world in (4, 2):  # the two read what the four wrote
        run_ranks(world, __file__, "write_in_ranks", folder)
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp"])
def test_layout_learns_what_one_process_learns(folder, alone, name):
    here, there = torch.load(folder / f"{name}.pt")["found"], alone[1]
    for key in ("loss", "norm", "gradients"):
        torch.testing.assert_close(here[key], there[key], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(here["recomputed"]["gradients"], there["gradients"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp"])
def test_bf16_is_the_same_in_every_layout(folder, name):
    here = torch.load(folder / f"{name}.pt")["found"]["bf16"]
    there = learn(prepare(Process(), Layout(), precision="bf16"), Process(), 1, size=1)
    torch.testing.assert_close(here["loss"], there["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(here["gradients"], there["gradients"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp"])
def test_resume_is_exact(folder, name):
    found = torch.load(folder / f"{name}.pt")["found"]
    assert found["after"] == found["resumed"]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "hsdp"])
def test_one_process_reads_every_layout(folder, name):
    state = torch.load(folder / f"{name}.pt")["state"]
    engine = prepare(Process(), Layout(), seed=1)
    engine.load(folder / name / "step-2")
    same(engine.state_dict(), state)
    model = ModelPlan.from_config(CONFIG).make_model()
    load_weights(folder / name / "step-2", model)
    same(model_state(model), {name: tensor for name, tensor in state.items() if name.startswith("model.")})


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_every_layout_reads_the_others(folder, name, source):
    """The ranks have compared every bit, and failed if one differed."""
    assert (name, source) in torch.load(folder / "read.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
