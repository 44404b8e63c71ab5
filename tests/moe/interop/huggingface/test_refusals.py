"""What Scatterfold cannot do is refused in one line that names file, key, value and what is allowed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from scatterfold.kernels import CheckpointError  # noqa: E402
from scatterfold.moe.interop.huggingface import is_huggingface, open_huggingface  # noqa: E402
from scatterfold.tests.moe.interop.huggingface.reference import make, save  # noqa: E402

MODELS = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
ONE_ROPE = "null, or one object for all layers with rope_type default, linear, llama3, yarn"
WINDOWS = ["full_attention", "sliding_attention"]
ONE_WINDOW = "null, or sliding_attention in all layers, since there is a sliding_window"
CHANGES = [
    # model_type, what config.json says instead (None deletes nothing; ... deletes), key named, what the line ends with
    ("llama", {"model_type": "gpt2"}, 'model_type="gpt2"', "olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe"),
    ("llama", {"model_type": "own", "auto_map": {"AutoModel": "a.B"}}, 'model_type="own"', "(auto_map) is never run"),
    ("llama", {"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4}', "not quantised"),
    ("llama", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config=", "one config for all layers"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder=true", "false"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures=", "LlamaForCausalLM"),
    ("llama", {"mlp_bias": True}, "mlp_bias=true", "false"),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}, 'hidden_act="gelu_pytorch_tanh"', '"swish", "gelu", "relu"'),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5", "1"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters=", "partial_rotary_factor of 1"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 2}}, "rope_parameters=", "at most 1"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling={"type": "dynamic"', ONE_ROPE),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters=", ONE_ROPE),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters=", ONE_ROPE),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling=", "null or an object"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "has no factor", "a number"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "ramp": 3}}, "rope_scaling=", "not ramp"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "model.rope_scaling.factor=0.5", "1 or more"),
    ("llama", {"hidden_size": "wide"}, 'hidden_size="wide"', "a whole number, 1 or more"),
    ("llama", {"hidden_size": 36.0}, "hidden_size=36.0", "a whole number, 1 or more"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0", "a whole number, 1 or more"),
    ("llama", {"num_key_value_heads": 3}, "model.kv_heads=3", "a divisor"),
    ("llama", {"head_dim": 5}, "model.head_width=5", "RoPE turns pairs)"),
    ("llama", {"tie_word_embeddings": "yes"}, 'tie_word_embeddings="yes"', "true or false"),
    ("llama", {"rms_norm_eps": "small"}, 'rms_norm_eps="small"', "a number"),
    ("mistral", {"layer_types": WINDOWS}, "layer_types=", ONE_WINDOW),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types=", ONE_WINDOW),
    ("mistral", {"layer_types": ["full_attention"]}, "layer_types=", "2 times sliding_attention or full_attention"),
    ("mistral", {"layer_types": ["chunked_attention"] * 2}, "layer_types=", "sliding_attention or full_attention"),
    ("mistral", {"layer_types": WINDOWS, "sliding_window": None}, "layer_types=", "where there is no sliding_window"),
    ("qwen2", {"layer_types": WINDOWS}, "layer_types=", "where there is no sliding_window"),
    ("qwen2", {"layer_types": ["conv"] * 2}, "layer_types=", "2 times sliding_attention or full_attention"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0", "a whole number, 1 or more"),
    (
        "qwen3_moe",
        {"layer_types": WINDOWS, "use_sliding_window": True, "sliding_window": 8},
        "layer_types=",
        ONE_WINDOW,
    ),
    ("mixtral", {"num_local_experts": 4, "num_experts": 8}, "num_local_experts=4 and num_experts=8", "or the same"),
    ("mixtral", {"num_local_experts": 1}, "num_local_experts=1", "a whole number, 2 or more"),
    ("mixtral", {"num_experts_per_tok": 5}, "router.top_k=5", "model.num_experts=4"),
    ("mixtral", {"router_jitter_noise": 1.5}, "router.jitter=1.5", "0 to below 1"),
    ("qwen3_moe", {"mlp_only_layers": "none"}, "mlp_only_layers=", "a list of layers, counting from 0"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "no layer is a MoE layer", "at least one, or model.num_experts=0"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0", "a whole number, 1 or more"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0", "null"),
    ("olmoe", {"sliding_window": 8}, "sliding_window=8", "null"),
    ("olmoe", {"head_dim": 16}, "head_dim=16", "8"),
    ("olmoe", {"norm_topk_prob": 1}, "norm_topk_prob=1", "true or false"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One folder of each model_type."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: save(make(name, **settings), folder / name) for name, settings in MODELS.items()}


def line(folder):
    with pytest.raises(CheckpointError) as error:
        open_huggingface(folder)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text and len(text) < 600
    return text


@pytest.mark.parametrize("model_type, changes, named, allowed", CHANGES, ids=[f"{c[0]} {c[2]}" for c in CHANGES])
def test_a_config_that_cannot_be_done(model_type, changes, named, allowed, sources, tmp_path):
    folder = shutil.copytree(sources[model_type], tmp_path / "model")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **changes}))
    text = line(folder)
    assert str(folder / "config.json") in text and named in text and text.endswith(allowed), text


@pytest.mark.parametrize("model_type", ["qwen2_moe"])
def test_any_value_of_any_key_gives_a_model_or_one_line(model_type, sources, tmp_path):
    folder = shutil.copytree(sources[model_type], tmp_path / "model")
    described = json.loads((folder / "config.json").read_text())
    refused = 0
    for key in [*described, "rope_scaling", "partial_rotary_factor", "mlp_only_layers", "num_experts"]:
        for value in (True, -1, "x", [[1]], {"rope_type": [1]}):
            (folder / "config.json").write_text(json.dumps({**described, key: value}))
            try:
                open_huggingface(folder)
            except CheckpointError as error:
                refused += 1
                assert "\n" not in str(error) and str(folder) in str(error)
    assert refused > 100


def test_a_config_that_is_missing_or_damaged(sources, tmp_path):
    folder = shutil.copytree(sources["llama"], tmp_path / "model")
    (folder / "config.json").write_text("{")
    assert line(folder).endswith("it is not JSON") and is_huggingface(folder)
    (folder / "config.json").write_text("[]")
    assert "not a JSON object" in line(folder)
    (folder / "config.json").unlink()
    assert "cannot be read" in line(folder) and not is_huggingface(folder)


def test_a_folder_of_scatterfold_is_not_one_of_hugging_face(sources, tmp_path):
    folder = shutil.copytree(sources["llama"], tmp_path / "model")
    assert is_huggingface(folder)
    (folder / "scatterfold.json").write_text("{}")
    assert not is_huggingface(folder)
    assert not is_huggingface(tmp_path / "nothing")


def test_pickles_are_refused_and_no_weights_too(sources, tmp_path):
    folder = shutil.copytree(sources["llama"], tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert is_huggingface(folder)
    assert "pytorch_model.bin, allowed: weights as safetensors only" in line(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "holds no weights, allowed: model.safetensors" in line(folder)


WEIGHTS = [
    ("llama", lambda held: held.pop("lm_head.weight"), "lacks lm_head.weight"),
    ("llama", lambda held: held.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
    ("llama", lambda held: held.update({"score.weight": torch.zeros(2)}), "holds score.weight"),
    ("llama", lambda held: held.update({"model.norm.weight": torch.zeros(3)}), "model.norm.weight is (3,)"),
    ("llama", lambda held: held.update({"model.norm.weight": torch.zeros(32).char()}), "is torch.int8"),
    (
        "mixtral",
        lambda held: held.pop("model.layers.0.block_sparse_moe.experts.3.w3.weight"),
        "lacks model.layers.0.block_sparse_moe.experts.3.w3.weight",
    ),
    (
        "olmoe",
        lambda held: held.update({"model.layers.0.mlp.experts.1.up_proj.weight": torch.zeros(24, 16)}),
        "experts.1.up_proj.weight is (24, 16), allowed: (24, 32)",
    ),
    (
        "olmoe",
        lambda held: held.update({"model.layers.0.mlp.experts.4.up_proj.weight": torch.zeros(24, 32)}),
        "holds model.layers.0.mlp.experts.4.up_proj.weight",
    ),
]


@pytest.mark.parametrize("model_type, change, named", WEIGHTS, ids=[case[2] for case in WEIGHTS])
def test_weights_that_are_not_those_of_the_config(model_type, change, named, sources, tmp_path):
    folder = shutil.copytree(sources[model_type], tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")
    assert named in line(folder)


def test_tied_embeddings_beside_another_head(sources, tmp_path):
    folder = shutil.copytree(sources["llama"], tmp_path / "model")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "tie_word_embeddings": True}))
    assert "tie_word_embeddings=true" in line(folder)
