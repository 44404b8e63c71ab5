"""Training under engine=megatron is what training under torch is: losses, norms, weights, and what AdamW remembers.

On the CPU, where the engine is refused, so ranks install the shim of `megatron_shim` first. Two ranks are started once;
they run all cases under both engines, and leave figures and checkpoints to compare.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from meshes_of import meshes_of

from scatterfold.kernels import CheckpointError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.context import StepContext
from scatterfold.moe.interop.megatron import open_megatron
from scatterfold.moe.megatron import MegatronEngine
from scatterfold.moe.training import run
from scatterfold.moe.training.makers import maker_of
from scatterfold.moe.training.optimizers import AdamW
from scatterfold.moe.training.router_statistics import RouterStatistics
from scatterfold.moe.training.settings import TrainerSettings
from scatterfold.parallel import Layout
from scatterfold.parallel.checkpoint import Checkpointer
from scatterfold.parallel.checkpoint.distributed import open_checkpoint
from scatterfold.parallel.checkpoint.lazy import constant
from scatterfold.parallel.engines import TorchEngine
from scatterfold.parallel.process import gather, running, sum_over_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

SEQUENCES, LENGTH, VOCAB = 8, 8, 30
STEPS, NOT_TAKEN, SAVED = 3, 0, 2
OPTIMIZER = AdamW(lr=0.01, weight_decay=1.0, eps=1e-3, decay_embeddings=False)  # eps: almost-zero gradients are noise
MODEL = {
    **{"vocab_size": VOCAB, "layers": 4, "width": 16, "heads": 4, "kv_heads": 2, "max_positions": LENGTH},
    **{"expert_width": 8, "num_experts": 4, "shared_expert_width": 8, "ffn_width": 24, "first_k_dense": 1},
    **{"qk_norm": "head", "attention_bias": True},
}
FROZEN = {
    "tie_embeddings": True,
    "frozen": ["embedding.weight", "blocks.0.attention.*", "blocks.1.mlp.router.*", "blocks.2.mlp.experts.*"],
}
MODELS = {"plain": {}, "frozen": FROZEN, "small": {"layers": 2}}
CASES = {  # model, layout, engine, and what differs from the trainer's defaults
    "dp overlap": ("frozen", Layout(), {"overlap": True, "bucket_mb": 0.002}, {}),
    "ep": ("frozen", Layout(ep=2), {}, {"activation_checkpointing": "full"}),
    "tp ep": ("plain", Layout(tp=2, ep=2), {"native_checkpoints": True}, {}),
    "tp etp": ("plain", Layout(tp=2, etp=2), {}, {"activation_checkpointing": "selective"}),
    "cp ep": ("plain", Layout(cp=2, ep=2), {}, {}),
    "pp": ("plain", Layout(pp=2), {}, {}),
    "pp interleaved": ("plain", Layout(pp=2), {"pipeline_schedule": "interleaved"}, {}),
}
RESUMED = {  # layout and engine's options (None for torch), and whose checkpoint
    "torch from tp ep": (Layout(), None, "tp ep"),
    "ep from torch": (Layout(ep=2), {}, "torch plain"),
    "pp interleaved from cp ep": (Layout(pp=2), {"pipeline_schedule": "interleaved"}, "cp ep"),
    "torch from pp interleaved": (Layout(tp=2), None, "pp interleaved"),
    "frozen dp from ep": (Layout(), {}, "ep"),
}


def engine_of(options):
    return TorchEngine() if options is None else MegatronEngine(**options)


def trainer_of(**options):
    return TrainerSettings(steps=STEPS, device="cpu", **options)


def config_of(model):
    return {
        "model": {**MODEL, **MODELS[model]},
        "router": {
            "_target_": "scatterfold.moe.routers.TopKRouter",
            **{"top_k": 2, "z_loss": 0.01, "balance_global_batch": 0.1, "balance_sequence": 0.1, "bias_rate": 0.01},
        },
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
    }


def prepare(process, model, layout, engine, seed=0, precision="fp32", **trainer):
    plan, meshes = ModelPlan.from_config(config_of(model)), meshes_of(layout, process)
    settings, maker = trainer_of(precision=precision, **trainer), maker_of(engine)
    maker.check_model(plan, settings, meshes.layout)
    place = {"process": process, "meshes": meshes}
    parts, sharding = maker.make_parts(plan, settings, **place, sequence_length=LENGTH, seed=seed)
    return engine.prepare(parts, OPTIMIZER, **place, plan=sharding, precision=precision, seed=seed)


def micro_batches(step, training, statistics=None):
    """This rank's share of the batch of a step, which is the same in every layout, of documents."""
    drawn = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=drawn)
    labels = tokens.roll(-1, 1).masked_fill(torch.rand(tokens.shape, generator=drawn) < 0.2, -100)
    meshes = training.meshes
    own = [part.chunk(meshes.data_world)[meshes.data_rank].chunk(2) for part in (tokens, labels)]
    context = StepContext(global_tokens=SEQUENCES * LENGTH, statistics=statistics)
    return [
        {"tokens": part, "labels": marked, "cu_seqlens": boundaries(part.shape[0]), "context": context}
        for part, marked in zip(*own)
    ]


def boundaries(rows):
    starts = [row * LENGTH + start for row in range(rows) for start in (0, 3)]
    return torch.tensor([*starts, rows * LENGTH], dtype=torch.int32)


def train(process, training, first, last, checkpointer=None, max_norm=0.5):
    """Figures of some steps, of which one is computed and not taken, as the step guard does it."""
    figures, by_name = [], None
    routers = [(index, layer) for part in training.parts for index, layer in part.moe_layers()]
    moe_layers = sorted({index for own in gather([index for index, _ in routers]) for index in own})
    statistics = RouterStatistics(
        moe_layers, MODEL["num_experts"], process.device, gather if training.meshes.pp else None
    )
    for step in range(first, last):
        share = training.run(micro_batches(step, training, statistics), scale=1 / (SEQUENCES * LENGTH))
        loss, norm = sum_over_ranks(share).item(), training.clip(max_norm).item()
        counted = statistics.reduce(sum_over_ranks)
        if step == 0:
            by_name = training.grad_norms_by_parameter()
        if step != NOT_TAKEN:
            for group in training.optimizer.param_groups:
                group["lr"] = OPTIMIZER.lr / (1 + step)
            training.step()
            for index, layer in routers:
                layer.router.finish_step(counted.counts[counted.layers.index(index)])
        training.zero_grad()
        figures.append([loss, norm, *counted.counts.flatten().tolist()])
        if checkpointer is not None and step + 1 in (SAVED, last):
            checkpointer.save(step + 1, training.state_dict(), {})
            training.save_beside(checkpointer.folder, step + 1)
    for part in training.parts:
        part.eval()
    evaluation = sum_over_ranks(sum(training.evaluate(batch) for batch in micro_batches(99, training))).item()
    return {"figures": figures, "evaluation": evaluation, "by_name": by_name}


def saved(folder, run, step):
    return Path(folder) / run / "checkpoints" / f"step-{step}"


def in_two_ranks(folder):
    from megatron_shim import install, stop_writers

    install()
    folder, found = Path(folder), {}
    with running("cpu", timeout_s=120) as process:

        def run(name, model, layout, options, **others):
            checkpointer = Checkpointer(folder / name / "checkpoints", process=process)
            training = prepare(process, model, layout, engine_of(options), **others)
            found[name] = train(process, training, 0, STEPS, checkpointer)
            return training

        def go_on(name, model, layout, options, source, **others):
            training = prepare(process, model, layout, engine_of(options), seed=7, **others)
            training.load(saved(folder, source, SAVED))
            found[name] = train(process, training, SAVED, STEPS)

        for model in ("plain", "frozen"):
            run(f"torch {model}", model, Layout(), None)
        for name, (model, layout, options, trainer) in CASES.items():
            training = run(name, model, layout, options, **trainer)
            if name == "tp ep":
                found["refused"] = refusals(folder, training)
        for name, (layout, options, source) in RESUMED.items():
            go_on(name, model_of(source), layout, options, source)
        run("torch bf16", "small", Layout(), None, precision="bf16")
        run("bf16", "small", Layout(tp=2, ep=2), {}, precision="bf16")
        go_on("bf16 from bf16", "small", Layout(tp=2, ep=2), {}, "bf16", precision="bf16")
        if process.is_main:
            (folder / "found.json").write_text(json.dumps(found))
    stop_writers()


def refusals(folder, training):
    """What loading says to tensors that do not fit, and whether it left the model as it was."""
    source = saved(folder, "torch plain", STEPS)
    remembered = open_checkpoint(source, "optimizer.")
    other_count = {**remembered, "blocks.1.attention.wk.weight.step": constant(1.0, ())}
    before = training.evaluate(micro_batches(99, training)[0])
    said = []
    for load in (
        lambda: training.load(saved(folder, "torch frozen", STEPS)),
        lambda: training.load_optimizer(other_count, source),
        lambda: training.load_weights(remembered, source),
    ):
        try:
            load()
        except CheckpointError as error:
            said.append(str(error))
    training.load_optimizer(remembered, source)
    return said, torch.equal(before, training.evaluate(micro_batches(99, training)[0]))


def alone(folder, config):
    """The whole training loop in one process, which has no process group: both engines, and one after the other."""
    from megatron_shim import install

    install()
    MegatronEngine.check = lambda self, layout, job: None
    config = json.loads(config)
    engines = {"torch": {"_target_": "scatterfold.parallel.engines.TorchEngine"}}
    engines["megatron"] = {"_target_": "scatterfold.moe.megatron.MegatronEngine"}
    for name, engine in engines.items():
        run.train({**config, "engine": engine}, Path(folder) / name)
    for name, source, engine in (("first", "megatron", "torch"), ("second", "torch", "megatron")):
        start = {"resume": str(Path(folder) / source / "checkpoints" / "step-2")}
        run.train({**config, **start, "engine": engines[engine]}, Path(folder) / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("megatron")
    run_ranks(2, __file__, "in_two_ranks", folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "found.json").read_text())


def model_of(name):
    return CASES[name][0] if name in CASES else name.split()[-1]


def assert_close(one, other, tolerance):
    """Figures are the same, relative to each."""
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_loads_are_those_of_torch(found, name):
    here, there = found[name], found[f"torch {model_of(name)}"]
    assert_close(here["figures"], there["figures"], 2e-6)
    assert_close(here["evaluation"], there["evaluation"], 2e-6)
    assert min(figures[1] for figures in there["figures"]) > 0.5  # clipping was at work
    assert here["by_name"].keys() == there["by_name"].keys()
    for parameter, norm in here["by_name"].items():
        assert norm == pytest.approx(there["by_name"][parameter], rel=1e-5, abs=1e-9), parameter


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [SAVED, STEPS])
def test_checkpoints_are_those_of_torch(folder, found, name, step):
    for kind in ("model.", "optimizer."):
        runs = (name, f"torch {model_of(name)}")
        here, there = (open_checkpoint(saved(folder, run, step), kind) for run in runs)
        assert here.keys() == there.keys() and len(there) > 10
        for tensor, stored in there.items():
            expected = stored.read().double()
            assert here[tensor].shape == stored.shape
            error = (here[tensor].read().double() - expected).abs().max()
            assert error <= 2e-5 * expected.abs().max(), tensor


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_under_another_engine(found, name):
    source = RESUMED[name][-1]
    assert_close(found[name]["figures"], found[source]["figures"][SAVED:], 2e-6)
    assert_close(found[name]["evaluation"], found[source]["evaluation"], 2e-6)


def test_bf16_learns_like_torch_and_keeps_float32_in_its_checkpoints(folder, found):
    for column, tolerance in ((0, 0.01), (1, 0.05)):  # losses, norms
        runs = [[figures[column] for figures in found[run]["figures"]] for run in ("bf16", "torch bf16")]
        assert_close(*runs, tolerance)
    model = open_checkpoint(saved(folder, "bf16", SAVED), "model.")
    for tensor in ("head.weight", "blocks.1.mlp.experts.w_in", "blocks.1.mlp.router.weight"):
        values = model[tensor].read()
        assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


def test_bf16_resumed_is_bf16_uninterrupted(found):
    assert found["bf16 from bf16"]["figures"] == found["bf16"]["figures"][SAVED:]
    assert found["bf16 from bf16"]["evaluation"] == found["bf16"]["evaluation"]


def test_what_does_not_fit_is_refused_and_changes_nothing(found):
    (other_model, other_count, other_tensors), is_unchanged = found["refused"]
    assert "is of another model: " in other_model and "head.weight" in other_model
    assert "wq.weight.step is 2 and blocks.1.attention.wk.weight.step is 1, " in other_count
    assert other_count.endswith("allowed: engine=torch")
    assert "missing there" in other_tensors
    assert is_unchanged


def test_megatrons_own_checkpoints_hold_the_same_weights(folder, found):
    native, described = folder / "tp ep" / "megatron", folder / "model.yaml"
    assert sorted(path.name for path in native.iterdir()) == [
        *(f"iter_{step:07d}" for step in (SAVED, STEPS)),
        "latest_checkpointed_iteration.txt",
    ]
    described.write_text(yaml.safe_dump(config_of("plain")))
    theirs = open_megatron(native / f"iter_{STEPS:07d}", described).checked().tensors
    ours = open_checkpoint(saved(folder, "tp ep", STEPS), "model.")
    assert len(theirs) > 50
    for name, tensor in theirs.items():
        if not name.endswith(".load"):  # what only training uses is not a part of the model there
            assert torch.equal(tensor.read(), ours[name].read()), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("alone")
    text = folder / "text"
    text.mkdir()
    for number in range(12):
        lines = [f"def function_{number}_{i}(x):\n    return x + {i * number}\n" for i in range(12)]
        (text / f"{number:02d}.py").write_text("\n".join(lines))
    data = {"path": str(text), "sequence_length": 16, "global_batch_size": 4, "micro_batch_size": 2}
    config = {
        **{"seed": 0, "layout": {}, "logger": {"display": "none"}},
        "model": {"layers": 2, "width": 16, "heads": 2, "expert_width": 16, "num_experts": 4},
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2, "bias_rate": 0.01, "z_loss": 0.01},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
        "data": {**data, "split": "90,10", "cache_dir": str(folder / "cache"), "workers": 1},
        "optimizer": {"_target_": "scatterfold.moe.training.AdamW", "lr": 3e-3, "eps": 1e-5},
        "schedule": {"_target_": "scatterfold.moe.training.Cosine", "warmup_steps": 2},
        "trainer": {"steps": 4, "checkpoint_every": 2, "eval_every": 2, "eval_batches": 1, "report": False},
    }
    config["trainer"]["device"] = "cpu"
    run_ranks(1, __file__, "alone", folder, json.dumps(config))
    return folder


def test_the_training_loop_runs_under_it_and_goes_on_either_way(runs):
    lines = {}
    for name in ("torch", "megatron", "first", "second"):
        read = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        keys = ("loss", "grad_norm", "valid_loss")
        lines[name] = [[line["step"], *(line[key] for key in keys if key in line)] for line in read]
    expected = lines["torch"]
    assert len(expected) > 6
    for name in ("megatron", "first", "second"):
        found = lines[name]
        assert len(found) >= 3
        for one, other in zip(found, expected[-len(found) :], strict=True):
            assert one == pytest.approx(other, rel=2e-5), name


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
