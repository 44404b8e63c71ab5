"""What the DeepSpeed engine refuses before anything starts, and what it tells DeepSpeed. None of it needs DeepSpeed."""

import contextlib
import json
import sys
from types import SimpleNamespace

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.moe.training.optimizers import AdamW
from scatterfold.parallel import Layout
from scatterfold.parallel.engines import DeepSpeedEngine, Job
from scatterfold.parallel.engines.deepspeed import library
from scatterfold.parallel.engines.deepspeed.settings import Offload, make_config

JOB = Job(micro_batches=4, micro_batch_size=2, gradient_clip=1.0, optimizer=AdamW(lr=0.003))


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(library, "version", lambda name: "0.19.8")


def check(engine=None, job=JOB, world=8, **layout):
    engine = engine or DeepSpeedEngine()
    engine.check(Layout(**layout).resolve(world), job)


@pytest.fixture
def with_json(tmp_path):
    def make(content, **options):
        file = tmp_path / "deepspeed.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return DeepSpeedEngine(**options, config=file)

    return make


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_data_parallelism_runs_with_every_stage(stage):
    check(DeepSpeedEngine(zero_stage=stage))
    if stage < 3:
        check(DeepSpeedEngine(zero_stage=stage), ep=4)


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({}, {"tp": 2}, "layout.tp=2 with engine=deepspeed, .* allowed: layout.tp=1, or engine=torch"),
        ({}, {"pp": 2}, "layout.pp=2 with engine=deepspeed, .* allowed: layout.pp=1, or engine=torch"),
        ({}, {"cp": 4}, "layout.cp=4 with engine=deepspeed, .* allowed: layout.cp=1, or engine=torch"),
        ({}, {"etp": 2}, "layout.etp=2 with engine=deepspeed, .* allowed: layout.etp=1, or engine=torch"),
        ({}, {"dp_shard": 8}, "layout.dp_shard=8 with engine=deepspeed, where engine.zero_stage .* or engine=torch"),
        (
            {"zero_stage": 3},
            {"ep": 2},
            "layout.ep=2 .* engine.zero_stage=3, .* engine.zero_stage=0, 1 or 2, or engine=",
        ),
        (
            {"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": "/x"},
            {},
            "offload_parameters=nvme needs a GPU .* allowed: none or cpu",
        ),
    ],
)
def test_what_cannot_run_is_refused_by_name(options, layout, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(DeepSpeedEngine(**options), **layout)
    assert "\n" not in str(caught.value)


def test_compiling_is_refused():
    with pytest.raises(ConfigError, match="trainer.compile=true with engine=deepspeed, allowed: .*, or engine=torch"):
        check(job=Job(compile=True))


@pytest.mark.parametrize("is_compatible", [True, False])
def test_a_missing_libaio_is_named(monkeypatch, is_compatible):
    builder = SimpleNamespace(is_compatible=lambda: is_compatible)
    module = SimpleNamespace(AsyncIOBuilder=lambda: builder)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", module)
    expected = (
        contextlib.nullcontext() if is_compatible else pytest.raises(ConfigError, match="libaio .* is missing, allo")
    )
    with expected:
        library.check_disk()


def test_a_missing_or_old_library_is_named(monkeypatch):
    monkeypatch.setattr(library, "version", lambda name: "0.17.2")
    with pytest.raises(ConfigError, match=r"needs deepspeed 0.19.8 or newer and finds 0.17.2, allowed: pip install "):
        check()

    def missing(name):
        raise library.PackageNotFoundError(name)

    monkeypatch.setattr(library, "version", missing)
    with pytest.raises(ConfigError, match="needs the package deepspeed, .* allowed: pip install .*, or engine=torch"):
        check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 4}, "engine.zero_stage=4 is unknown, allowed: 0, 1, 2, 3"),
        ({"bucket_mb": 0.0}, "engine.bucket_mb=0.0 is out of range, allowed: above 0"),
        ({"offload_optimizer": "disk"}, "engine.offload_optimizer='disk' is unknown, allowed: none, cpu, nvme"),
        (
            {"zero_stage": 0, "offload_optimizer": "cpu"},
            "engine.offload_optimizer=cpu with engine.zero_stage=0, .*=1, 2, 3, or none",
        ),
        (
            {"zero_stage": 2, "offload_optimizer": "nvme"},
            "engine.offload_optimizer=nvme with engine.zero_stage=2, .*=3",
        ),
        (
            {"zero_stage": 2, "offload_parameters": "cpu"},
            "engine.offload_parameters=cpu with engine.zero_stage=2, .*=3",
        ),
        (
            {"zero_stage": 3, "offload_optimizer": "nvme"},
            "engine.offload_optimizer=nvme needs engine.nvme_path, allowed",
        ),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ConfigError, match=message):
        DeepSpeedEngine(**options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3 contradicts engine.zero_stage=1, allowed: 1"),
        ({"train_batch_size": 32}, "train_batch_size=32 contradicts data.global_batch_size=64, allowed: 64"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu=1 contradicts data.micro_batch_size=2"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps=8 contradicts data.global_batch_size .*: 4"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 contradicts trainer.gradient_clip=1.0, allowed: 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=true contradicts trainer.precision=fp32, .* allowed: false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true contradicts trainer.precision=fp32, allowed: false"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type=Lamb contradicts optimizer=adamw, allowed: AdamW"),
        ({"optimizer": {"params": {"lr": 0.1}}}, "optimizer.params.lr=0.1 contradicts optimizer.lr=0.003"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op=sum contradicts how the engine sums gradients"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device=cpu contradicts engine.offload_optimizer=none",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not for this engine, allowed: schedule=…"),
        (
            {"tensor_parallel": {"autotp_size": 2}},
            "tensor_parallel is not for this engine, allowed: layout.tp with eng",
        ),
    ],
)
def test_a_json_that_contradicts_the_config_is_named_with_both_values(with_json, content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(with_json(content))
    assert "engine.config=" in str(caught.value) and "\n" not in str(caught.value)


def test_a_json_that_agrees_or_leaves_it_to_us_passes(with_json):
    same = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "adamw", "params": {"lr": "auto", "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "round_robin_gradients": True},
        "wall_clock_breakdown": True,
    }
    check(with_json(same))


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_file_that_is_no_configuration(with_json, tmp_path, content):
    with pytest.raises(ConfigError, match="deepspeed.json (is no JSON|holds no object)"):
        with_json(content)
    with pytest.raises(ConfigError, match="engine.config=.*missing.json cannot be read: No such file"):
        DeepSpeedEngine(config=tmp_path / "missing.json")


def test_what_deepspeed_is_told():
    raw = {
        "train_batch_size": 64,
        "optimizer": {"type": "AdamW"},
        "bf16": {"enabled": "auto"},
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": "auto", "sub_group_size": 1000, "offload_param": {"buffer_count": 7}},
    }
    offload = Offload(3, "cpu", "nvme", "/fast")
    told = make_config(raw, 3, offload, bucket_mb=1.0, overlap=True, precision="bf16", on_gpu=True)
    assert told["wall_clock_breakdown"] and "optimizer" not in told and "train_batch_size" not in told
    assert told["torch_autocast"]["enabled"] and "bf16" not in told  # parameters stay float32
    zero = told["zero_optimization"]
    assert (zero["stage"], zero["sub_group_size"], zero["overlap_comm"]) == (3, 1000, True)
    assert zero["reduce_bucket_size"] == 2**20 // 4  # elements of float32
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_param"] == {"device": "nvme", "pin_memory": True, "nvme_path": "/fast", "buffer_count": 7}
