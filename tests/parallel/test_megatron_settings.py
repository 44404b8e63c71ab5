"""What engine=megatron refuses before anything starts, in one line that names the field and who can."""

from dataclasses import fields, replace

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.megatron import MegatronEngine
from scatterfold.moe.training.makers import ModelMaker, TransformerMaker, maker_of
from scatterfold.moe.training.optimizers import AdamW
from scatterfold.moe.training.settings import TrainerSettings
from scatterfold.parallel import Layout
from scatterfold.parallel.engines import DeepSpeedEngine, Job, TorchEngine
from scatterfold.parallel.engines.megatron import library
from scatterfold.parallel.layout import ATTENTION_SIZES

JOB = Job(micro_batches=4, micro_batch_size=2, gradient_clip=1.0, on_gpu=True, optimizer=AdamW(lr=0.003))
MODEL = {
    **{"vocab_size": 32, "layers": 4, "width": 16, "heads": 4, "expert_width": 8, "num_experts": 4, "ffn_width": 16},
    "max_positions": 16,
}
ROUTER = {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2}
EXPERTS = {"_target_": "scatterfold.moe.Experts"}
LATENT = {"kv_rank": 8, "nope_width": 4, "rope_width": 4, "value_width": 4}
ADAPTERS = {"_target_": "scatterfold.moe.AdapterExperts", "adapter_width": 4}


def check(job=JOB, world=8, engine=None, **layout):
    (engine or MegatronEngine()).check(Layout(**layout).resolve(world), job)


def check_model(model=None, router=None, experts=None, trainer=None, world=8, engine=None, **layout):
    groups = {
        "model": {**MODEL, **(model or {})},
        "router": {**ROUTER, **(router or {})},
        "experts": experts or EXPERTS,
    }
    groups["dispatcher"] = {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"}
    settings = TrainerSettings(steps=1, **(trainer or {}))
    plan = ModelPlan.from_config(groups)
    (engine or MegatronEngine()).check_model(plan, settings, Layout(**layout).resolve(world))


def test_without_cuda_one_line_says_so_and_who_can():
    with pytest.raises(ConfigError) as caught:
        check(replace(JOB, on_gpu=False), dp_shard=2)
    assert str(caught.value) == (
        "engine=megatron needs CUDA, and this run is on the CPU, allowed: engine=torch, or engine=deepspeed"
    )


@pytest.mark.parametrize(
    ("layout", "job", "message"),
    [
        ({"dp_shard": 2}, {}, "layout.dp_shard=2 with engine=megatron, .* allowed: layout.dp_shard=1, or engine=torch"),
        ({}, {"compile": True}, "trainer.compile=true with engine=megatron, allowed: .*=false, or engine=torch"),
        ({"pp": 8}, {}, "engine.pipeline_schedule=1f1b over layout.pp=8 with 4 micro-batches a step"),
    ],
)
def test_what_the_engine_cannot_run_is_refused(layout, job, message):
    with pytest.raises(ConfigError, match=message):
        check(replace(JOB, **job), **layout)


def test_every_other_field_of_a_job_runs():
    """A new field has to be dealt with here, and in `check`."""
    known = {"micro_batches", "micro_batch_size", "precision", "gradient_clip", "checkpointing", "compile", "on_gpu"}
    assert {field.name for field in fields(Job)} == {*known, "optimizer"}
    for change in ({"precision": "bf16"}, {"gradient_clip": None}, {"checkpointing": "full"}):
        check(replace(JOB, **change), tp=2, pp=2, cp=2, ep=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pipeline_schedule": "zero_bubble"},
            "engine.pipeline_schedule=zero_bubble .* allowed: 1f1b, interleaved, or ",
        ),
        ({"pipeline_schedule": "gpipe"}, "engine.pipeline_schedule=gpipe with engine=megatron, .* or engine=torch"),
        ({"pipeline_schedule": "what"}, "engine.pipeline_schedule='what' is unknown"),
        ({"virtual_stages": 2}, "engine.virtual_stages=2 with engine.pipeline_schedule=1f1b, allowed: 1"),
        ({"bucket_mb": 0.0}, "engine.bucket_mb=0.0 is out of range, allowed: above 0"),
    ],
)
def test_options_that_it_does_not_have(options, message):
    with pytest.raises(ConfigError, match=message):
        MegatronEngine(**options)


def test_a_missing_package_for_native_checkpoints_is_named(monkeypatch):
    monkeypatch.setattr("scatterfold.parallel.engines.megatron.engine.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match="engine.native_checkpoints=true needs psutil, .* allowed: pip install psutil"
    ):
        check(engine=MegatronEngine(native_checkpoints=True))


@pytest.mark.parametrize("found", [None, "0.17.0", "0.15.3"])
def test_another_release_of_megatron_core_is_named(monkeypatch, found):
    def version(name):
        if found is None:
            raise library.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(library, "version", version)
    with pytest.raises(ConfigError, match=f"{found or 'not installed'}, allowed: pip install .*, or engine=torch"):
        check()


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        (
            {"trainer": {"activation_offload": True}},
            {},
            "trainer.activation_offload=true with engine=megatron, .*=torch",
        ),
        ({"model": {"qk_norm": "projection"}}, {}, "model.qk_norm"),
        ({"model": {"latent_attention": LATENT}}, {}, "model.latent_attention .* allowed: null, or engine=torch"),
        ({"model": {"attention_output_bias": True}}, {}, "model.attention_output_bias"),
        ({"model": {"vocab_size": 33}}, {"tp": 2}, "layout.tp=2 does not divide model.vocab_size=33"),
        ({"model": {"layers": 3}}, {"pp": 2}, "layout.pp=2 .* model.layers=3"),
        ({"model": {"tie_embeddings": True}}, {"pp": 2}, "model.tie_embeddings=true with layout.pp=2, allowed: false"),
        ({"experts": ADAPTERS}, {}, "experts: adapters .* allowed: engine=torch"),
        ({"experts": {**EXPERTS, "bias": True}}, {"etp": 2}, "experts.bias=true with layout.etp=2"),
    ],
)
def test_what_gpt_model_cannot_express_is_refused_by_name(change, layout, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_model(**change, **layout)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        ({}, {"tp": 2, "cp": 2, "pp": 2, "ep": 4}),
        (
            {"model": {"sliding_window": 4, "attention_sinks": True, "qk_norm": "head", "attention_bias": True}},
            {"tp": 2},
        ),
        ({"model": {"shared_expert_width": 8, "shared_expert_gate": True, "moe_layers": [1, 3]}}, {"etp": 2}),
        ({"model": {"num_experts": 0, "frozen": ["embedding.*"]}}, {}),
        ({"router": {"jitter": 0.1, "capacity_factor": 1.5, "bias_rate": 0.1, "gate_bias": True}}, {"ep": 4}),
        ({"trainer": {"activation_checkpointing": "selective", "precision": "bf16", "deterministic": True}}, {}),
    ],
)
def test_what_runs_is_not_refused(change, layout):
    check_model(**change, **layout)


def test_the_engine_makes_its_model_and_others_get_ours():
    assert isinstance(MegatronEngine(), ModelMaker)
    for engine in (TorchEngine(), DeepSpeedEngine()):
        assert isinstance(maker_of(engine), TransformerMaker)
    assert maker_of(MegatronEngine(bucket_mb=3.0)).bucket_mb == 3.0


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "ep": 4}, {"cp": 2, "ep": 2, "etp": 2}, {"pp": 2, "tp": 2, "ep": 2}])
def test_our_order_of_ranks_is_megatrons(sizes):
    """Groups by megatron's own generator of ranks, in the order that the engine gives it."""
    from megatron.core.parallel_state import RankGenerator

    layout = Layout(**sizes).resolve(16)
    dense = RankGenerator(layout.tp, 1, layout.data, layout.pp, layout.cp, library.ORDER)
    experts = RankGenerator(layout.etp, layout.ep, layout.edp, layout.pp, 1, library.ORDER)
    groups = layout.groups()
    for name in ("tp", "cp", "pp"):
        assert sorted(dense.get_ranks(name)) == sorted(groups[name]), name
    assert sorted(dense.get_ranks("dp")) == sorted(groups["dp_replicate"])
    for name, theirs in (("ep", "ep"), ("etp", "tp"), ("edp_replicate", "dp"), ("pp", "pp")):
        assert sorted(experts.get_ranks(theirs)) == sorted(groups[name]), name
    assert "dp_replicate" in ATTENTION_SIZES and not torch.distributed.is_initialized()
