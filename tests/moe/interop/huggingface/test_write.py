"""Models of ours in transformers: the architecture that fits, what is added to fit, what cannot be said."""

import dataclasses
import inspect
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from scatterfold import Experts, ModelConfig, TopKRouter  # noqa: E402
from scatterfold.kernels import CheckpointError, ConfigError  # noqa: E402
from scatterfold.moe.interop.huggingface import (  # noqa: E402
    choose_architecture,
    misfit,  # noqa: E402
    write_huggingface,
)
from scatterfold.moe.interop.stored import StoredModel  # noqa: E402
from scatterfold.parallel.checkpoint.lazy import in_memory  # noqa: E402
from scatterfold.tests.moe.interop.huggingface.reference import (  # noqa: E402
    VOCABULARY,
    assert_same_bits,
    assert_same_model,
    load,
    opened,
    values,
    weights,
    write,
)

TOP_K = "scatterfold.moe.routers.TopKRouter"
MODEL = {"vocab_size": VOCABULARY, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "max_positions": 64}
DENSE = {**MODEL, "ffn_width": 24}
MOE = {**MODEL, "num_experts": 5, "expert_width": 12}


def groups(model, router=None, experts=None):
    """`router` and `experts` change what the default groups say."""
    return {
        "model": dict(model),
        "router": {"_target_": TOP_K, "top_k": 2, **(router or {})},
        "experts": {"_target_": "scatterfold.moe.Experts", **(experts or {})},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
    }


def stored_model(config, dtype=torch.float32, source="nowhere"):
    """A model of ours with random weights, norms and biases included."""
    empty = StoredModel(source=source, format="scatterfold", config=config, tensors={})
    model = empty.plan().make_model()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, tensor in model.state_dict().items():
        drawn = torch.empty(tensor.shape).normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
        tensors[name] = in_memory(drawn if ".losses." in name else drawn.to(dtype))
    return empty.with_model(config, tensors)


FITTING = {
    "llama": groups(DENSE),
    "llama, with what only a mixture would use": groups({**DENSE, "shared_expert_width": 9}, {"scale": 2.0}),
    "mistral": groups({**DENSE, "sliding_window": 7}),
    "mistral, width that heads do not divide": groups({**DENSE, "heads": 6, "kv_heads": 3, "head_width": 8}),
    "qwen2": groups({**DENSE, "attention_bias": True, "head_width": 6}),
    "qwen3": groups({**DENSE, "qk_norm": "head", "sliding_window": 9, "activation": "reglu"}),
    "mixtral": groups(MOE, {"jitter": 0.1, "z_loss": 0.1, "capacity_factor": 1.0}),
    "mixtral, softmax of the chosen": groups({**MOE, "sliding_window": 5}, {"score": "softmax_after"}),
    "mixtral, global balance": groups(MOE, {"balance_global_batch": 0.01}, {"activation": "geglu"}),
    "olmoe": groups({**MOE, "qk_norm": "projection"}, {"renormalise": False, "balance_micro_batch": 0.25}),
    "qwen3_moe": groups({**MOE, "qk_norm": "head", "ffn_width": 20, "moe_layers": [1]}),
    "qwen2_moe, gated": groups({**MOE, "attention_bias": True, "shared_expert_width": 6, "shared_expert_gate": True}),
    "qwen2_moe, ungated": groups({**MOE, "shared_expert_width": 6}),
    "qwen2_moe, nothing shared": groups({**MOE, "attention_bias": True}),
    "qwen2_moe, dense layer": groups({**MOE, "ffn_width": 20, "first_k_dense": 1}),
    "qwen2_moe, raw weights": groups(MOE, {"renormalise": False}),
}


@pytest.mark.parametrize("name", FITTING)
def test_a_model_of_ours_computes_the_same_there(name, tmp_path):
    config = FITTING[name]
    stored = stored_model(config)
    assert choose_architecture(config).model_type == name.split(",")[0]
    folder = write(stored, tmp_path / "model")
    assert_same_model(load(folder), stored.build())
    back = opened(folder)
    held = {key: value for key, value in values(stored).items() if ".losses." not in key}
    assert_same_bits(values(back), held)
    assert_same_model(load(write(back, tmp_path / "again")), stored.build())
    assert_same_bits(weights(tmp_path / "again"), weights(folder))


@pytest.mark.parametrize("name", ["qwen2_moe, ungated", "qwen2_moe, nothing shared"])
def test_what_is_added_is_in_the_dtype_of_the_model_and_must_stay_zero(name, tmp_path):
    folder = write(stored_model(FITTING[name], torch.bfloat16), tmp_path / "model")
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    theirs = load(folder)
    with torch.no_grad():
        shared = theirs.model.layers[1].mlp
        (shared.shared_expert_gate if "ungated" in name else shared.shared_expert.down_proj).weight[0, 0] = 1.0
    theirs.save_pretrained(tmp_path / "trained")
    with pytest.raises(CheckpointError, match="is not zero, but config.json says scatterfold_"):
        opened(tmp_path / "trained")


def test_no_setting_of_ours_is_lost_silently():
    """A new field of the model, the router or the experts must be said, demanded, or be of training alone."""
    said = (
        "vocab_size layers width heads kv_heads head_width ffn_width expert_width num_experts first_k_dense moe_every"
    )
    said += " moe_layers shared_expert_gate activation max_positions rope_theta rope_scaling norm_eps tie_embeddings"
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {*misfit.PLAIN_MODEL} - {*said.split()}
    assert fields == {"init_std", "frozen"}

    routers = {"width", "num_experts", "top_k", "eval_top_k", "score", "renormalise", "top_groups", "group_score"}
    trained = {"jitter", "capacity_factor", "balance_micro_batch", "balance_sequence", "balance_global_batch", "z_loss"}
    fields = set(inspect.signature(TopKRouter).parameters) - {*misfit.PLAIN_ROUTER} - routers - trained
    assert fields == {"min_capacity", "drop"}  # of the capacity alone

    fields = set(inspect.signature(Experts).parameters) - {*misfit.PLAIN_EXPERTS}
    assert fields == {"num_experts", "width", "expert_width", "activation", "backend", "recompute"}


def test_the_router_comes_back(tmp_path):
    router = {"top_k": 3, "renormalise": True, "jitter": 0.125, "balance_micro_batch": 0.03}
    folder = write(stored_model(groups(MOE, router)), tmp_path / "model")
    assert opened(folder).config["router"] == {"_target_": TOP_K, **router}
    described = json.loads((folder / "config.json").read_text())
    assert described["router_aux_loss_coef"] == 0.03 and described["router_jitter_noise"] == 0.125


def test_the_architecture_it_came_from_is_taken_again_and_one_may_be_asked_for(tmp_path):
    stored = stored_model(groups(DENSE))
    assert choose_architecture(stored.config, preferred="mistral").model_type == "mistral"
    assert choose_architecture(stored.config, preferred="qwen3").model_type == "llama"
    folder = write(stored, tmp_path / "model", architecture="mistral")
    assert_same_model(load(folder), stored.build())
    again = write(opened(folder), tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]


def test_ranks_share_the_files_and_the_bytes_are_the_same(tmp_path):
    stored = stored_model(groups(MOE))
    alone = write(stored, tmp_path / "alone", 10_000)
    (tmp_path / "shared").mkdir()
    for rank in (1, 0, 2):
        files = write_huggingface(stored, tmp_path / "shared", 10_000, rank=rank, world=3)
    assert len(files) > 3
    for path in alone.iterdir():
        assert path.read_bytes() == (tmp_path / "shared" / path.name).read_bytes(), path.name


MISFITS = [
    # asked for, groups, the line
    ("llama", groups(MOE), "model.num_experts=5 does not fit llama, allowed: 0"),
    ("llama", groups({**DENSE, "qk_norm": "head"}), "model.qk_norm=head does not fit llama, allowed: none"),
    (
        "llama",
        groups({**DENSE, "attention_bias": True}),
        "model.attention_output_bias=false does not fit llama, allowed: true",
    ),
    ("qwen2", groups(DENSE), "model.attention_bias=false does not fit qwen2, allowed: true"),
    (
        "mistral",
        groups({**DENSE, "sliding_window": 7, "window_layers": [0]}),
        "model.window_layers=[0] does not fit mistral, allowed: null",
    ),
    ("llama", groups({**DENSE, "rotary_width": 4}), "model.rotary_width=4 does not fit llama, allowed: null"),
    ("llama", groups({**DENSE, "attention_sinks": True}), "model.attention_sinks=true does not fit llama"),
    ("llama", groups({**DENSE, "sliding_window": 7}), "model.sliding_window=7 does not fit llama, allowed: null"),
    ("llama", groups({**DENSE, "activation": "relu2"}), "model.activation=relu2 does not fit llama, allowed: geglu"),
    ("mixtral", groups(DENSE), "model.num_experts=0 does not fit mixtral, allowed: 2 or more"),
    (
        "mixtral",
        groups({**MOE, "ffn_width": 9, "moe_every": 2}),
        "model.moe_layers=[1] does not fit mixtral, allowed: all layers (layer 0 is dense)",
    ),
    ("mixtral", groups(MOE, {"renormalise": False}), "router.renormalise=false does not fit mixtral, allowed: true"),
    ("mixtral", groups(MOE, {"scale": 2.5}), "router.scale=2.5 does not fit mixtral, allowed: 1.0"),
    ("mixtral", groups(MOE, {"score": "sigmoid"}), "router.score=sigmoid does not fit mixtral, allowed: softmax"),
    ("mixtral", groups(MOE, {"bias_rate": 0.1}), "router.bias_rate=0.1 does not fit mixtral, allowed: null"),
    ("mixtral", groups(MOE, {"gate_bias": True}), "router.gate_bias=true does not fit mixtral, allowed: false"),
    ("mixtral", groups(MOE, {"eval_top_k": 1}), "router.eval_top_k=1 does not fit mixtral, allowed: null, 2"),
    ("mixtral", groups(MOE, {"eval_capacity_factor": 2.0}), "router.eval_capacity_factor=2.0 does not fit mixtral"),
    ("mixtral", groups(MOE, None, {"bias": True}), "experts.bias=true does not fit mixtral, allowed: false"),
    (
        "mixtral",
        groups(MOE, None, {"activation": "relu2"}),
        "experts.activation=relu2 does not fit mixtral, allowed: ge",
    ),
    (
        "olmoe",
        groups({**MOE, "qk_norm": "projection", "head_width": 6}),
        "model.head_width=6 does not fit olmoe, allowed: model.width / model.heads",
    ),
    (
        "qwen2_moe",
        groups({**MOE, "shared_expert_width": 6}, None, {"activation": "geglu"}),
        "experts.activation=geglu does not fit qwen2_moe, allowed: swiglu",
    ),
]


@pytest.mark.parametrize("asked, config, text", MISFITS, ids=[case[2] for case in MISFITS])
def test_an_architecture_that_does_not_fit(asked, config, text, tmp_path):
    with pytest.raises(ConfigError) as error:
        write_huggingface(stored_model(config), tmp_path, 10**9, architecture=asked)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_a_model_that_no_architecture_fits(tmp_path):
    threshold = {
        **groups(MOE),
        "router": {"_target_": "scatterfold.moe.routers.ThresholdRouter", "threshold": 0.5},
    }
    with pytest.raises(ConfigError) as error:
        choose_architecture(threshold)
    text = str(error.value)
    assert "\n" not in text and "llama (model.num_experts=5)" in text
    assert "mixtral (router._target_=scatterfold.moe.routers.ThresholdRouter)" in text
    with pytest.raises(ConfigError, match="architecture=gpt2 is unknown, allowed: .*llama, mistral"):
        write_huggingface(stored_model(groups(DENSE)), tmp_path, 10**9, architecture="gpt2")
