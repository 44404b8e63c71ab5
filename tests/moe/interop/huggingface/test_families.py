"""DeepSeek, GLM-4 and GPT-OSS: layouts, what is dropped, what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from scatterfold.kernels import CheckpointError  # noqa: E402
from scatterfold.moe.interop.huggingface import open_huggingface  # noqa: E402
from scatterfold.tests.moe.interop.huggingface.reference import (  # noqa: E402
    CASES,
    assert_same_bits,
    assert_same_model,
    load,
    make,
    opened,
    save,
    values,
    weights,
    write,
)

FAMILIES = {
    "deepseek_v2": CASES["deepseek_v2"][1],
    "deepseek_v3": CASES["deepseek_v3"][1],
    "glm4_moe": CASES["glm4_moe"][1],
    "gpt_oss": CASES["gpt_oss"][1],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One folder of each model_type; do not change it."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: save(make(name, **settings), folder / name) for name, settings in FAMILIES.items()}


@pytest.fixture
def copy_of(sources, tmp_path):
    """`copy_of(model_type, **changes)`: a folder whose config.json says something else; ... removes a key."""

    def copy(model_type, **changes):
        folder = shutil.copytree(sources[model_type], tmp_path / "model")
        described = {**json.loads((folder / "config.json").read_text()), **changes}
        described = {key: value for key, value in described.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(described))
        return folder

    return copy


def change_weights(folder, **new):
    held = load_file(folder / "model.safetensors")
    save_file({**held, **new}, folder / "model.safetensors", metadata={"format": "pt"})


def line(folder):
    with pytest.raises(CheckpointError) as error:
        open_huggingface(folder)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text
    return text


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_experts_in_either_layout_and_in_bfloat16(model_type, tmp_path):
    theirs = make(model_type, torch.bfloat16, **FAMILIES[model_type])
    apart, fused = save(theirs, tmp_path / "apart"), save(theirs, tmp_path / "fused", fused=True)
    assert any(".experts.0." in key for key in weights(apart))
    assert any(key.endswith(".mlp.experts.gate_up_proj") for key in weights(fused))
    stored = opened(apart)
    assert_same_bits(values(opened(fused)), values(stored))
    for layout, expected in ((False, apart), (True, fused)):
        assert_same_bits(weights(write(stored, tmp_path / f"back {layout}", fused=layout)), weights(expected))


def test_gpt_oss_lies_transposed_with_gate_and_up_in_turns(sources, tmp_path):
    stored, theirs = opened(sources["gpt_oss"]), weights(sources["gpt_oss"])
    w_in, key = stored.tensors["blocks.1.mlp.experts.w_in"], "model.layers.1.mlp.experts.gate_up_proj"
    assert w_in.shape == (6, 2, 24, 32)
    for expert, half, row in ((0, 0, 0), (5, 1, 23), (3, 0, 11)):
        assert torch.equal(w_in.read()[expert, half, row], theirs[key][expert, :, 2 * row + half])
        part = [slice(expert, expert + 1), slice(half, half + 1), slice(row, row + 1), slice(3, 9)]
        assert torch.equal(w_in.read(part)[0, 0, 0], theirs[key][expert, 3:9, 2 * row + half])
    bias = stored.tensors["blocks.1.mlp.experts.b_in"].read()
    assert torch.equal(bias[:, 1], theirs[f"{key}_bias"][:, 1::2])
    half = make("gpt_oss", torch.bfloat16, **FAMILIES["gpt_oss"])
    source = save(half, tmp_path / "half")
    assert_same_bits(weights(write(opened(source), tmp_path / "back")), weights(source))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_the_correction_bias_is_the_expert_bias(model_type, sources, tmp_path):
    stored = opened(sources[model_type])
    assert stored.config["router"]["bias_rate"] == 0.0
    key, name = "model.layers.1.mlp.gate.e_score_correction_bias", "blocks.1.mlp.router.expert_bias"
    held = weights(sources[model_type])[key]
    assert held.any() and torch.equal(stored.tensors[name].read(), held)
    router = {key: value for key, value in stored.config["router"].items() if key != "bias_rate"}
    tensors = {name: tensor for name, tensor in stored.tensors.items() if not name.endswith("expert_bias")}
    without = stored.with_model({**stored.config, "router": router}, tensors)
    folder = write(without, tmp_path / "without")
    assert not weights(folder)[key].any()
    assert_same_model(load(folder), without.build())


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_tokens_are_dropped(model_type, copy_of, sources, tmp_path):
    folder = copy_of(model_type, num_nextn_predict_layers=2)
    further = {"3.eh_proj.weight": torch.ones(2), "4.mlp.experts.0.up_proj.weight_scale_inv": torch.ones(1)}
    change_weights(folder, **{f"model.layers.{key}": tensor for key, tensor in further.items()})
    stored = opened(folder)
    assert_same_bits(values(stored), values(opened(sources[model_type])))
    back = write(stored, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert_same_bits(weights(back), weights(sources[model_type]))
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "num_nextn_predict_layers": 1}))
    assert "holds model.layers.4.mlp.experts.0.up_proj.weight_scale_inv" in line(folder)


def test_fp8_is_refused(copy_of):
    described = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    folder = copy_of("deepseek_v3", quantization_config=described)
    assert 'quantization_config={"quant_method": "fp8"' in line(folder)
    assert line(folder).endswith("allowed: null: weights that are not quantised")
    key = "model.layers.0.self_attn.kv_b_proj.weight"
    change_weights(folder, **{key: torch.zeros(72, 12).to(torch.float8_e4m3fn)})
    file = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**file, "quantization_config": None}))
    assert f"{key} is torch.float8_e4m3fn, allowed: torch.float64" in line(folder)


def test_mxfp4_is_read_for_gpt_oss_alone(copy_of):
    assert "allowed: null: weights that are not" in line(
        copy_of("glm4_moe", quantization_config={"quant_method": "mxfp4"})
    )


PUBLISHED = {
    "deepseek_v2": {
        **{"aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "pretraining_tp": 1, "scoring_func": "softmax"},
        **{"seq_aux": True, "head_dim": ..., "rope_parameters": ..., "rope_theta": 10000},
        "rope_scaling": {
            **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
            **{"original_max_position_embeddings": 16, "type": "yarn"},
        },
    },
    "deepseek_v3": {
        **{"ep_size": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "head_dim": ...},
        **{"rope_interleave": ..., "rope_parameters": ..., "rope_theta": 10000},
        "rope_scaling": {
            **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
            **{"original_max_position_embeddings": 16, "type": "yarn"},
        },
    },
    "glm4_moe": {
        **{"partial_rotary_factor": 0.5, "rope_scaling": None, "rope_theta": 1000000, "rope_parameters": ...},
        "num_nextn_predict_layers": 1,
    },
    "gpt_oss": {
        **{"experts_per_token": 3, "initial_context_length": 16, "rope_theta": 150000, "rope_parameters": ...},
        "rope_scaling": {
            **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False},
            "original_max_position_embeddings": 16,
        },
    },
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_a_config_as_it_is_published(model_type, copy_of):
    folder = copy_of(model_type, **PUBLISHED[model_type])
    assert_same_model(load(folder), opened(folder).build())


@pytest.mark.parametrize(("model_type", "removed"), [("gpt_oss", "layer_types"), ("glm4_moe", "partial_rotary_factor")])
def test_what_the_file_leaves_out_is_as_in_their_class(model_type, removed, copy_of):
    """GPT-OSS: YaRN and windows in every other layer. GLM: half of each head turns."""
    folder = copy_of(model_type, rope_parameters=..., rope_scaling=..., rope_theta=..., **{removed: ...})
    assert_same_model(load(folder), opened(folder).build())


CHANGES = [
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=true", "false"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, 'scoring_func="sigmoid"', '"softmax"'),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, 'topk_method="noaux_tc"', '"greedy", "group_limited_greedy"'),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias=true", "false"),
    ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2", "4, one for each head of latent attention"),
    ("deepseek_v3", {"scoring_func": "softmax"}, 'scoring_func="softmax"', '"sigmoid"'),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2", "1"),
    ("deepseek_v3", {"n_group": 3}, "router.num_groups=3", "model.num_experts=8"),
    ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts=0", "a whole number, 1 or more"),
    ("deepseek_v3", {"v_head_dim": 14}, "model.latent_attention.value_width=14", "at most that"),
    ("deepseek_v3", {"first_k_dense_replace": 3}, "no layer is a MoE layer", "or model.num_experts=0"),
    ("glm4_moe", {"n_routed_experts": 8, "num_experts": 4}, "n_routed_experts=8 and num_experts=4", "or the same"),
    ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "model.rotary_width=3", "model.head_width=8"),
    ("gpt_oss", {"swiglu_limit": 8.0}, "swiglu_limit=8.0", "7.0"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0", "1.702"),
    ("gpt_oss", {"hidden_act": "gelu"}, 'hidden_act="gelu"', '"silu"'),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types=", "3 times sliding_attention or full_attention"),
    ("gpt_oss", {"sliding_window": None}, "layer_types=", "where there is no sliding_window"),
    ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config=", "that are not quantised"),
]


@pytest.mark.parametrize("model_type, changes, named, allowed", CHANGES, ids=[f"{c[0]} {c[2]}" for c in CHANGES])
def test_a_config_that_cannot_be_done(model_type, changes, named, allowed, copy_of):
    text = line(copy_of(model_type, **changes))
    assert named in text and text.endswith(allowed), text
