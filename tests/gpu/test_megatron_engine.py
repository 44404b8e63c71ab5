"""engine=megatron on one CUDA device, nothing of Megatron changed: the whole training loop, against engine=torch."""

import copy
import json

import pytest
import torch

from scatterfold.moe.training.run import train
from scatterfold.parallel.checkpoint.distributed import open_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
pytest.importorskip("megatron.core")

ENGINES = {
    "torch": {"_target_": "scatterfold.parallel.engines.TorchEngine"},
    "megatron": {"_target_": "scatterfold.moe.megatron.MegatronEngine"},
}
STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        lines = [f"def function_{number}_{i}(x):\n    return x + {i * number}\n" for i in range(30)]
        (folder / f"{number:02d}.py").write_text("\n".join(lines))
    model = {"layers": 3, "width": 128, "heads": 4, "kv_heads": 2, "expert_width": 64, "num_experts": 8}
    model |= {"ffn_width": 256, "first_k_dense": 1, "shared_expert_width": 64, "qk_norm": "head"}
    data = {"path": str(folder), "sequence_length": 128, "global_batch_size": 8, "micro_batch_size": 2}
    return {
        **{"seed": 0, "layout": {}, "logger": {"display": "none"}, "model": model},
        "router": {
            "_target_": "scatterfold.moe.routers.TopKRouter",
            **{"top_k": 2, "bias_rate": 0.001, "balance_sequence": 0.01, "z_loss": 0.001},
        },
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
        "data": {**data, "split": "90,10", "cache_dir": str(folder.parent / "cache"), "workers": 1},
        "optimizer": {"_target_": "scatterfold.moe.training.AdamW", "lr": 3e-3, "eps": 1e-5},
        "schedule": {"_target_": "scatterfold.moe.training.Cosine", "warmup_steps": 2},
        "trainer": {
            **{"steps": STEPS, "checkpoint_every": 2, "eval_every": 2, "eval_batches": 1, "report": False},
            **{"device": "cuda", "gradient_clip": 0.5},
        },
    }


def figures(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        [line["step"], *(line[key] for key in ("loss", "grad_norm", "valid_loss") if key in line)] for line in lines
    ]


def run(config, run_dir, engine, **trainer):
    config = copy.deepcopy(config)
    config["trainer"] |= trainer
    train({**config, "engine": {**ENGINES[engine], **config.pop("options", {})}}, run_dir)
    return figures(run_dir)


@pytest.mark.parametrize(
    ("trainer", "tolerance"),
    [
        ({"precision": "fp32"}, 2e-3),
        ({"precision": "bf16"}, 5e-2),
        ({"precision": "bf16", "activation_checkpointing": "full"}, 5e-2),
        ({"precision": "bf16", "activation_checkpointing": "selective"}, 5e-2),
    ],
)
def test_it_learns_what_torch_learns(config, tmp_path, trainer, tolerance):
    wanted = run(config, tmp_path / "torch", "torch", **trainer)
    found = run(config, tmp_path / "megatron", "megatron", **trainer)
    assert len(found) == len(wanted) > STEPS
    for one, other in zip(found, wanted):
        assert one == pytest.approx(other, rel=tolerance)


def test_a_run_goes_on_under_the_other_engine(config, tmp_path):
    wanted = run(config, tmp_path / "whole", "torch")
    for first, second in (("torch", "megatron"), ("megatron", "torch")):
        folder = tmp_path / f"{first}-{second}"
        run(config, folder, first, stop_after=2)
        found = run(config, folder, second)
        for one, other in zip(found[-3:], wanted[-3:], strict=True):
            assert one == pytest.approx(other, rel=5e-3)


def test_checkpoints_hold_float32_parameters_and_megatrons_own_lies_beside(config, tmp_path):
    pytest.importorskip("psutil")
    with_native = {**config, "options": {"native_checkpoints": True}}
    run(with_native, tmp_path / "run", "megatron", precision="bf16")
    tensors = open_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{STEPS}", "model.")
    values = tensors["head.weight"].read()
    assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())
    assert (tmp_path / "run" / "megatron" / f"iter_{STEPS:07d}" / ".metadata").is_file()


def test_overlap_changes_nothing(config, tmp_path):
    plain = run(config, tmp_path / "plain", "megatron")
    overlapping = run({**config, "options": {"overlap": True}}, tmp_path / "overlap", "megatron")
    for one, other in zip(overlapping, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
