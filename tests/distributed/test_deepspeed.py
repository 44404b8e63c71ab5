"""Training under DeepSpeed is what training under torch is: losses, norms, weights, and what the optimizer remembers.

Two ranks are started once; they run all cases under both engines, and leave figures and checkpoints to compare.
"""

import ctypes
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from meshes_of import meshes_of

from scatterfold.kernels import CheckpointError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.context import StepContext
from scatterfold.moe.sharding import sharding_plan
from scatterfold.moe.training.optimizers import AdamW
from scatterfold.parallel import Layout
from scatterfold.parallel.checkpoint import Checkpointer
from scatterfold.parallel.checkpoint.distributed import open_checkpoint
from scatterfold.parallel.engines import DeepSpeedEngine, TorchEngine
from scatterfold.parallel.process import running, sum_over_ranks

if importlib.util.find_spec("deepspeed") is None:  # importing it takes seconds, and ranks need it only
    pytest.skip("needs deepspeed: pip install 'scatterfold[deepspeed]'", allow_module_level=True)

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

SEQUENCES, LENGTH, VOCAB, MICRO_BATCHES = 8, 8, 29, 2  # micro-batches of a rank of two
STEPS, NOT_TAKEN, SAVED = 5, 1, 2
OPTIMIZER = AdamW(lr=0.01, weight_decay=1.0, eps=1e-3)  # a small eps makes noise of gradients that are almost zero
MODEL = {
    **{"vocab_size": VOCAB, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "max_positions": LENGTH},
    **{"expert_width": 8, "num_experts": 4, "shared_expert_width": 8, "ffn_width": 24},
}
MODELS = {
    "dense": {"num_experts": 0, "shared_expert_width": None},
    "moe": {"tie_embeddings": True},
    "large": {"width": 64, "expert_width": 512, "num_experts": 16},
    "frozen": {"frozen": ["embedding.weight", "blocks.0.attention.*", "blocks.1.mlp.router.*"]},
    "adapters": {},
}
EXPERTS = {"adapters": {"_target_": "scatterfold.moe.AdapterExperts", "adapter_width": 6}}
# Nothing is too small to be cut in stage 3, and groups of parameters are updated in several parts.
JSON = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 1000, "stage": "auto"}}
CASES = {  # model, layout, and what differs from the engine's defaults
    "dense 0": ("dense", Layout(), {"zero_stage": 0}),
    "dense 1": ("dense", Layout(), {"zero_stage": 1}),
    "dense 2": ("dense", Layout(), {"zero_stage": 2, "overlap": True, "bucket_mb": 0.002}),
    "dense 3": ("dense", Layout(), {"zero_stage": 3}),
    "moe 1": ("moe", Layout(), {"zero_stage": 1}),
    "moe 2": ("moe", Layout(), {"zero_stage": 2, "native_checkpoints": True}),
    "moe 3": ("moe", Layout(), {"zero_stage": 3, "bucket_mb": 0.002, "native_checkpoints": True}),
    "moe ep 0": ("moe", Layout(ep=2), {"zero_stage": 0, "native_checkpoints": True}),
    "moe ep 1": ("moe", Layout(ep=2), {"zero_stage": 1}),
    "moe ep 2": ("moe", Layout(ep=2), {"zero_stage": 2, "native_checkpoints": True}),
    "frozen 1": ("frozen", Layout(), {"zero_stage": 1}),
    "frozen 3": ("frozen", Layout(), {"zero_stage": 3}),
    "frozen ep 2": ("frozen", Layout(ep=2), {"zero_stage": 2}),
    "adapters 3": ("adapters", Layout(), {"zero_stage": 3}),
    "adapters ep 2": ("adapters", Layout(ep=2), {"zero_stage": 2}),
}
NATIVE = [name for name, (_, _, options) in CASES.items() if "native_checkpoints" in options]
CONVERTED = ["moe 2", "moe 3"]  # by DeepSpeed's tools, which know no experts that are spread
REFERENCES = sorted({"dense", "moe", "moe ep", "frozen", "frozen ep", "adapters", "adapters ep"})
RESUMED = {  # how it goes on from whose checkpoint
    "torch from moe 2": ("moe", Layout(), None, "moe 2"),
    "moe 3 from torch": ("moe", Layout(), {"zero_stage": 3}, "moe"),
    "moe 1 from moe 3": ("moe", Layout(), {"zero_stage": 1}, "moe 3"),
    "moe ep 2 from moe 3": ("moe", Layout(ep=2), {"zero_stage": 2}, "moe 3"),
    "torch from moe ep 1": ("moe", Layout(), None, "moe ep 1"),
    "moe ep 0 from torch": ("moe", Layout(ep=2), {"zero_stage": 0}, "moe"),
}


def engine_of(options, folder):
    return TorchEngine() if options is None else DeepSpeedEngine(**options, config=folder / "deepspeed.json")


def prepare(process, model, layout, engine, **options):
    config = {
        "model": {**MODEL, **MODELS[model]},
        "router": {
            "_target_": "scatterfold.moe.routers.TopKRouter",
            **{"top_k": 2, "z_loss": 0.01, "balance_global_batch": 0.1},
        },
        "experts": EXPERTS.get(model, {"_target_": "scatterfold.moe.Experts"}),
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
    }
    plan, meshes = ModelPlan.from_config(config), meshes_of(layout, process)
    with torch.device("meta"):
        parts = plan.make_parts(engine.schedule, "full" if model == "frozen" else "none", meshes)
    plan = sharding_plan(parts)
    return engine.prepare(parts, OPTIMIZER, process=process, meshes=meshes, plan=plan, **options)


def micro_batches(step, process):
    """This rank's share of the batch of a step, which is the same however many ranks there are."""
    tokens = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step))
    own = tokens.chunk(process.world)[process.rank].chunk(MICRO_BATCHES * 2 // process.world)
    context = StepContext(global_tokens=SEQUENCES * LENGTH)
    return [{"tokens": part, "labels": part.roll(-1, 1), "context": context} for part in own]


def train(process, training, first, last, checkpointer=None, max_norm=0.5):
    """Figures of some steps, of which one is computed and not taken, as the step guard does it."""
    figures = []
    for step in range(first, last):
        share = training.run(micro_batches(step, process), scale=1 / (SEQUENCES * LENGTH))
        loss, norm = sum_over_ranks(share).item(), training.clip(max_norm).item()
        if step == 0:
            by_name = training.grad_norms_by_parameter()
        if step != NOT_TAKEN:
            training.step()
        training.zero_grad()
        figures.append([loss, norm])
        if step == NOT_TAKEN:
            spoilt = not_finite(process, training)
        if checkpointer is not None and step + 1 in (SAVED, last):
            checkpointer.save(step + 1, training.state_dict(), {})
            training.save_beside(checkpointer.folder, step + 1)
    evaluation = sum_over_ranks(training.evaluate(micro_batches(99, process)[0])).item()
    found = {"figures": figures, "evaluation": evaluation}
    return {**found, "by_name": by_name, "spoilt": spoilt} if first == 0 else found


def not_finite(process, training):
    """Gradients that are not finite, and forgotten: the norm, and whose they are."""
    training.run(micro_batches(NOT_TAKEN, process), scale=float("inf"))
    norm, by_name = training.clip(0.5).item(), training.grad_norms_by_parameter()
    training.zero_grad()
    return [math.isfinite(norm), sorted(name for name, norm in by_name.items() if not math.isfinite(norm))]


def saved(folder, run, step):
    return Path(folder) / run / "checkpoints" / f"step-{step}"


class MemoryInUse(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]

    @classmethod
    def bytes(cls):
        mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
        mallinfo2.restype = cls
        found = mallinfo2()
        return found.uordblks + found.hblkhd


def kept_of_experts(process, folder):
    """What stage 3 keeps of the experts from a forward pass to its backward pass, when told to keep nothing."""
    eager = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    file = folder / f"eager{process.rank}.json"
    file.write_text(json.dumps({"zero_optimization": JSON["zero_optimization"] | eager}))
    training = prepare(process, "large", Layout(), DeepSpeedEngine(zero_stage=3, config=file))
    train(process, training, 0, 3)  # the first learns in which order modules come, and buffers are made
    before, after = MemoryInUse.bytes(), []
    whole_pass = training._engine.backward
    training._engine.backward = lambda *args, **options: (
        after.append(MemoryInUse.bytes()) or whole_pass(*args, **options)
    )
    training.run(micro_batches(3, process)[:1], scale=1.0)
    named = training.named_parameters()
    return (after[0] - before) / sum(4 * parameter.ds_numel for name, parameter in named if ".experts." in name)


def in_two_ranks(folder):
    folder, found = Path(folder), {}
    with running("cpu", timeout_s=120) as process:

        def run(name, model, layout, engine, **options):
            checkpointer = Checkpointer(folder / name / "checkpoints", process=process)
            training = prepare(process, model, layout, engine, **options)
            found[name] = train(process, training, 0, STEPS, checkpointer)

        for name in REFERENCES:
            run(name, name.split()[0], Layout(ep=2 if "ep" in name else 1), TorchEngine())
        for name, (model, layout, options) in CASES.items():
            run(name, model, layout, engine_of(options, folder))
        for name, (model, layout, options, source) in RESUMED.items():
            training = prepare(process, model, layout, engine_of(options, folder), seed=7)
            training.load(saved(folder, source, SAVED))
            found[name] = train(process, training, SAVED, STEPS)
        for name in NATIVE:
            model, layout, options = CASES[name]
            training = prepare(process, model, layout, engine_of(options, folder), seed=7)
            training._engine.load_checkpoint(str(folder / name / "deepspeed"), tag=f"step-{SAVED}")
            found[f"native {name}"] = train(process, training, SAVED, STEPS)
        run("bf16", "moe", Layout(), TorchEngine(), precision="bf16")
        run("bf16 2", "moe", Layout(), engine_of({"zero_stage": 2}, folder), precision="bf16")
        run("bf16 3", "moe", Layout(), engine_of({"zero_stage": 3}, folder), precision="bf16")
        everywhere = {"offload_optimizer": "cpu"}
        run("offload 2", "moe", Layout(), engine_of({"zero_stage": 2, **everywhere}, folder))
        everywhere["offload_parameters"] = "cpu"
        run("offload 3", "moe", Layout(), engine_of({"zero_stage": 3, **everywhere}, folder))
        found["kept of experts"] = kept_of_experts(process, folder)
        training = prepare(process, "dense", Layout(), engine_of({"zero_stage": 2}, folder))
        try:
            training.load(saved(folder, "moe", SAVED))
        except CheckpointError as error:
            found["refused"] = str(error)
    if process.is_main:
        for name in CONVERTED:
            found[f"converted {name}"] = errors_of_tools(folder, name)
        (folder / "found.json").write_text(json.dumps(found))


def in_four_ranks(folder):
    """Experts on two ranks each, so that their gradients are summed over others than the rest."""
    folder, found, layout = Path(folder), {}, Layout(ep=2)
    with running("cpu", timeout_s=120) as process:
        for stage in (None, 0, 1, 2):
            options = None if stage is None else {"zero_stage": stage, "native_checkpoints": stage == 2}
            training = prepare(process, "moe", layout, engine_of(options, folder))
            checkpointer = Checkpointer(folder / str(stage) / "checkpoints", process=process)
            found[str(stage)] = train(process, training, 0, SAVED + 1, checkpointer)
        training = prepare(process, "moe", layout, engine_of({"zero_stage": 2}, folder), seed=7)
        training._engine.load_checkpoint(str(folder / "2" / "deepspeed"), tag=f"step-{SAVED}")
        found["native"] = train(process, training, SAVED, SAVED + 1)
        if process.is_main:
            (folder / "four.json").write_text(json.dumps(found))


def errors_of_tools(folder, run):
    """How far what DeepSpeed's tools make of its checkpoint is from ours, by tool and tensor."""
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    native, universal, ours = folder / run / "deepspeed", folder / run / "universal", saved(folder, run, SAVED)
    weights = get_fp32_state_dict_from_zero_checkpoint(str(native), tag=f"step-{SAVED}")
    model, remembered = (open_checkpoint(ours, kind) for kind in ("model.", "optimizer."))
    parser_of = sys.argv
    sys.argv = ["ds_to_universal", "--input_folder", str(native / f"step-{SAVED}"), "--output_folder", str(universal)]
    sys.argv += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    ds_to_universal.main(ds_to_universal.parse_arguments())
    sys.argv = parser_of
    errors = {"zero_to_fp32": {}, "ds_to_universal": {}}
    for name, tensor in model.items():
        errors["zero_to_fp32"][name] = (weights[name] - tensor.read()).abs().max().item()
    learned = {f"{name}.fp32": tensor for name, tensor in model.items() if f"{name}.exp_avg" in remembered}
    for full, tensor in {**learned, **remembered}.items():
        if tensor.shape:
            name, _, kind = full.rpartition(".")
            found = torch.load(universal / "zero" / name / f"{kind}.pt", weights_only=False)
            found = found["param"] if isinstance(found, dict) else found  # of stages 1 and 2, or of stage 3
            errors["ds_to_universal"][full] = (found.view(tensor.shape) - tensor.read()).abs().max().item()
    return errors


def go_on(folder, source, step, last, to, stage, ep):
    """Other ranks go on where some stopped, and stop in turn."""
    folder = Path(folder)
    with running("cpu", timeout_s=120) as process:
        engine = engine_of({"zero_stage": int(stage)}, folder)
        training = prepare(process, "moe", Layout(ep=int(ep)), engine, seed=7)
        training.load(saved(folder, source, step))
        checkpointer = Checkpointer(folder / to / "checkpoints", process=process)
        found = train(process, training, int(step), int(last), checkpointer)
        if process.is_main:
            (folder / f"{to}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "deepspeed.json").write_text(json.dumps(JSON))
    run_ranks(2, __file__, "in_two_ranks", folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "found.json").read_text())


def assert_close(one, other, tolerance):
    """Figures and checkpoints are the same: absolutely, relative to the largest value of a tensor."""
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=tolerance, atol=0)


def reference(name):
    model, *rest = name.split()
    return f"{model} ep" if "ep" in rest else model


@pytest.mark.parametrize("name", CASES)
def test_losses_and_norms_are_those_of_torch(found, name):
    here, there = found[name], found[reference(name)]
    assert_close(here["figures"], there["figures"], 1e-6)
    assert_close(here["evaluation"], there["evaluation"], 1e-6)
    norms = [norm for _, norm in there["figures"]]
    assert min(norms) > 0.5  # clipping was at work
    assert here["by_name"].keys() == there["by_name"].keys()
    for parameter, norm in here["by_name"].items():
        assert norm == pytest.approx(there["by_name"][parameter], rel=1e-5, abs=1e-9), parameter


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [SAVED, STEPS])
def test_checkpoints_are_those_of_torch(folder, found, name, step):
    for kind in ("model.", "optimizer."):
        here, there = (open_checkpoint(saved(folder, run, step), kind) for run in (name, reference(name)))
        assert here.keys() == there.keys() and len(there) > 10
        for tensor, stored in there.items():
            expected = stored.read().double()
            error = (here[tensor].read().double() - expected).abs().max()
            assert here[tensor].shape == stored.shape
            assert error <= 2e-6 * expected.abs().max(), tensor


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_under_another_engine(found, name):
    _, _, _, source = RESUMED[name]
    assert_close(found[name]["figures"], found[source]["figures"][SAVED:], 2e-6)
    assert_close(found[name]["evaluation"], found[source]["evaluation"], 2e-6)


def test_a_run_goes_on_with_another_number_of_ranks_and_with_the_first_number_again(folder, found, run_ranks):
    run_ranks(1, __file__, "go_on", folder, "moe 3", SAVED, STEPS - 1, "alone", 2, 1)
    run_ranks(2, __file__, "go_on", folder, "alone", STEPS - 1, STEPS, "together", 1, 2)
    here = [json.loads((folder / f"{run}.json").read_text()) for run in ("alone", "together")]
    assert_close([figures for run in here for figures in run["figures"]], found["moe 3"]["figures"][SAVED:], 1e-5)
    assert_close(here[-1]["evaluation"], found["moe 3"]["evaluation"], 1e-5)


def test_experts_with_copies_on_other_ranks(tmp_path, run_ranks):
    (tmp_path / "deepspeed.json").write_text(json.dumps(JSON))
    run_ranks(4, __file__, "in_four_ranks", tmp_path)
    found = json.loads((tmp_path / "four.json").read_text())
    for stage in ("0", "1", "2"):
        assert_close(found[stage]["figures"], found["None"]["figures"], 1e-6)
        assert_close(found[stage]["evaluation"], found["None"]["evaluation"], 1e-6)
        for parameter, norm in found[stage]["by_name"].items():
            assert norm == pytest.approx(found["None"]["by_name"][parameter], rel=1e-5, abs=1e-9), parameter
    assert_close(found["native"]["figures"], found["2"]["figures"][SAVED:], 1e-6)


@pytest.mark.parametrize("name", NATIVE)
def test_deepspeed_reads_its_own_checkpoints(found, name):
    assert_close(found[f"native {name}"]["figures"], found[name]["figures"][SAVED:], 1e-6)
    assert_close(found[f"native {name}"]["evaluation"], found[name]["evaluation"], 1e-6)


def test_each_expert_has_a_file_in_deepspeeds_checkpoint(folder):
    files = {path.name for path in (folder / "moe ep 2" / "deepspeed" / f"step-{SAVED}").glob("layer_*")}
    assert files == {f"layer_{layer}_expert_{e}_mp_rank_00_model_states.pt" for layer in range(2) for e in range(4)}


@pytest.mark.parametrize("name", CONVERTED)
def test_tools_of_deepspeed_make_our_tensors_of_its_checkpoint(found, name):
    for tool, errors in found[f"converted {name}"].items():
        assert len(errors) > 10 and all(error == 0 for error in errors.values()), (tool, errors)


@pytest.mark.parametrize("name", CASES)
def test_gradients_that_are_not_finite_are_told_and_forgotten(found, name):
    is_finite, names = found[name]["spoilt"]  # that the run goes on as before, the figures after it tell
    assert not is_finite and names == found[reference(name)]["spoilt"][1] and names


@pytest.mark.parametrize("name", ["bf16 2", "bf16 3"])
def test_bf16_is_the_same_autocast(found, name):
    assert_close(found[name]["figures"], found["bf16"]["figures"], 1e-6)
    assert (
        abs(found["bf16"]["figures"][0][0] / found["moe"]["figures"][0][0] - 1) > 1e-5
    )  # the tolerance tells them apart


@pytest.mark.parametrize("name", ["offload 2", "offload 3"])
def test_offload_changes_nothing(found, name):
    assert_close(found[name]["figures"], found["moe"]["figures"], 1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="counts bytes with glibc")
def test_stage_3_keeps_no_gathered_experts_for_the_backward_pass(found):
    assert found["kept of experts"] < 0.1  # two thirds, if autograd's views of them kept the memory


def test_a_checkpoint_of_another_model_is_refused(found):
    assert "is of another model" in found["refused"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
