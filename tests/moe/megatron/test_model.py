"""GPTModel with our layers against our own Transformer, and what cannot be described to Megatron."""

import pytest
import torch
import yaml

from scatterfold.kernels import CheckpointError, ConfigError
from scatterfold.parallel.checkpoint.lazy import in_memory
from scatterfold.parallel.layout import ResolvedLayout

GPT_OSS = (
    {
        "moe_layers": None,
        "attention_bias": True,
        "attention_output_bias": True,
        "attention_sinks": True,
        "sliding_window": 4,
        "window_layers": [0, 2],
    },
    {"score": "softmax_after", "gate_bias": True},
    {"activation": "clamped_swiglu", "bias": True},
)
CASES = {
    "mixtral": ({}, {}, {}),
    "qwen": ({"qk_norm": "head", "shared_expert_width": 6, "shared_expert_gate": True, "tie_embeddings": True}, {}, {}),
    "gpt_oss": GPT_OSS,
    "threshold": ({"rotary_width": 2}, {"_target_": "scatterfold.moe.routers.ThresholdRouter", "threshold": 0.4}, {}),
    "dense": ({"num_experts": 0, "moe_layers": None, "activation": "geglu"}, {}, {}),
}


@pytest.fixture(params=CASES)
def plan(request, plan_of):
    return plan_of(*CASES[request.param])


def gpt(plan, seed=0, **options):
    from scatterfold.moe.megatron import build_gpt_model, transformer_config

    return build_gpt_model(plan, transformer_config(plan, layout=ResolvedLayout(), **options), seed=seed)


def ours(plan, seed=0):
    model = plan.make_model()
    model.reset_parameters(seed)
    return model


def test_initial_values_are_those_of_our_own_model(megatron, plan):
    from scatterfold.moe.megatron import to_ours

    found, wanted = to_ours(gpt(plan, seed=3)), ours(plan, seed=3).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_logits_and_losses_are_those_of_our_own_model(megatron, plan):
    """With other values than the initial ones, and several documents in a row."""
    from scatterfold.moe.megatron import load_ours, to_ours

    model, reference = gpt(plan), ours(plan)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in reference.state_dict().values():
            tensor.normal_(0.3, 0.3, generator=generator)
    wanted = reference.state_dict()
    load_ours(model, {name: in_memory(tensor) for name, tensor in wanted.items()})
    found = to_ours(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    tokens, labels = torch.randint(0, 64, (2, 3, 24), generator=generator)
    cu_seqlens = torch.tensor([0, 10, 24, 24 + 3, 48, 72], dtype=torch.int32)
    losses = model(tokens, labels=labels, cu_seqlens=cu_seqlens)
    assert losses.shape == (3, 24)
    torch.testing.assert_close(losses.sum(), reference(tokens, labels, cu_seqlens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.eval()(tokens), reference.eval()(tokens), rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit_change_nothing(megatron, plan_of):
    from scatterfold.moe.megatron import load_ours, to_ours

    plan = plan_of()
    model = gpt(plan)
    before, other = to_ours(model), ours(plan, seed=1).state_dict()
    for wrong, message in {
        "head.weight": r"head.weight is \(64, 15\), allowed: \(64, 16\)",
        "blocks.1.mlp.experts.w_in": "blocks.1.mlp.experts.w_in is missing",
    }.items():
        tensors = {**other, wrong: other[wrong][:, :15]}
        if "missing" in message:
            del tensors[wrong]
        with pytest.raises(CheckpointError, match=message):
            load_ours(model, tensors)
    assert all(torch.equal(values, before[name]) for name, values in to_ours(model).items())


def test_what_is_frozen_gets_no_gradient(megatron, plan_of):
    model = gpt(plan_of({"frozen": ["blocks.*.attention.*", "embedding.*", "blocks.1.mlp.experts.*"]}))
    model(*torch.randint(0, 64, (1, 2, 8))).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any("self_attention" in name or "embedding" in name for name in trained)
    assert "decoder.layers.2.mlp.experts.w_in" in trained and "decoder.layers.1.mlp.experts.w_in" not in trained
    with pytest.raises(ConfigError, match=r"freezes blocks.0.attention.wq.weight and not blocks.0.attention.wk.weight"):
        gpt(plan_of({"frozen": ["blocks.*.attention.wq.weight"]}))


@pytest.mark.parametrize(
    "case",
    [GPT_OSS, ({"moe_layers": None, "shared_expert_width": 6, "activation": "relu2"}, {}, {"activation": "relu2"})],
)
def test_a_checkpoint_of_layers_that_share_their_keys(megatron, plan_of, base_model, tmp_path, case):
    """Where every layer is a MoE layer they are slices of one key. Read back, and by `open_megatron`."""
    from megatron.core import dist_checkpointing

    from scatterfold.moe.interop.megatron import open_megatron
    from scatterfold.moe.megatron import to_ours

    plan = plan_of(*case)
    model, other = gpt(plan, seed=1), gpt(plan, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    wanted = to_ours(model)
    megatron.save(model, tmp_path / "saved")
    other.load_state_dict(dist_checkpointing.load(other.sharded_state_dict(), str(tmp_path / "saved")))
    assert all(torch.equal(values, wanted[name]) for name, values in to_ours(other).items())

    described = {name: dict(getattr(plan, name)) for name in ("router", "experts")}
    described["model"] = {**base_model, **case[0]}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(described))
    tensors = open_megatron(tmp_path / "saved", tmp_path / "model.yaml").checked().tensors
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensor.read(), wanted[name]) for name, tensor in tensors.items())


def test_groups_of_another_size_are_refused(megatron, plan_of):
    from scatterfold.moe.megatron import build_gpt_model, transformer_config

    config = transformer_config(plan_of(), layout=ResolvedLayout(ep=2, dp_replicate=2))
    with pytest.raises(ConfigError, match="Megatron's groups have ep=1, allowed: layout.ep=2"):
        build_gpt_model(plan_of(), config)


LATENT = {"_target_": "scatterfold.moe.blocks.LatentAttention", "latent_width": 8, "rope_width": 4}
ADAPTERS = {"_target_": "scatterfold.moe.adapters.AdapterExperts", "adapter_width": 4}
YARN = {"_target_": "scatterfold.moe.blocks.YarnScaling", "factor": 2.0, "original_positions": 12}


@pytest.mark.parametrize(
    ("model", "experts", "layout", "options", "message"),
    [
        ({"qk_norm": "projection"}, {}, {}, {}, "model.qk_norm=projection does not fit engine=megatron"),
        ({"rope_scaling": YARN}, {}, {}, {}, "model.rope_scaling=YarnScaling does not fit engine=megatron"),
        ({"attention_output_bias": True}, {}, {}, {}, "attention_output_bias=true does not fit"),
        ({}, ADAPTERS, {}, {}, "adapters on a shared MLP do not run in engine=megatron"),
        ({}, {"bias": True}, {"etp": 2}, {}, "experts.bias=true with layout.etp=2"),
        ({}, {}, {"tp": 4, "etp": 4}, {}, "layout.tp=4 does not divide model.kv_heads=2"),
        ({"vocab_size": 63}, {}, {"tp": 2}, {}, "layout.tp=2 does not divide model.vocab_size=63"),
        ({}, {}, {"pp": 2}, {}, "layout.pp=2 x 1 stages do not divide model.layers=3"),
        ({}, {}, {"pp": 3}, {"virtual_stages": 2}, "layout.pp=3 x 2 stages do not divide model.layers=3"),
        ({}, {}, {}, {"virtual_stages": 3}, "engine.virtual_stages=3 with layout.pp=1, allowed: null"),
        ({"tie_embeddings": True}, {}, {"pp": 3}, {}, "model.tie_embeddings=true with layout.pp=3"),
        ({}, {}, {"dp_shard": 2}, {}, "layout.dp_shard=2 is not what engine=megatron does"),
        ({"num_experts": 0, "moe_layers": None}, {}, {"ep": 2}, {}, "layout.ep=2, layout.etp=1 without experts"),
        ({}, {}, {}, {"precision": "fp8"}, "trainer.precision='fp8' is unknown, allowed: fp32, bf16"),
        ({}, {}, {}, {"checkpointing": "some"}, "trainer.activation_checkpointing='some' is unknown"),
    ],
)
def test_what_cannot_run_is_refused_before_any_group(tools, plan_of, model, experts, layout, options, message):
    from scatterfold.moe.megatron import transformer_config

    plan = plan_of(model, experts=experts)
    with pytest.raises(ConfigError, match=message):
        transformer_config(plan, layout=ResolvedLayout(**layout), **options)


def test_tensor_parallel_experts_need_sequence_parallelism(tools, plan_of):
    from scatterfold.moe.megatron import transformer_config

    config = transformer_config(plan_of(), layout=ResolvedLayout(tp=2))
    assert config.sequence_parallel and config.expert_tensor_parallel_size == 1
