"""Hugging Face's model classes as an independent reference: the same weights must give the same logits and loss."""

import pytest
import torch
import torch.nn.functional as F

from scatterfold import Experts, ModelConfig, TopKRouter, Transformer
from scatterfold.moe.blocks import LinearScaling, Llama3Scaling, YarnScaling

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OURS = {"vocab_size": 61, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "max_positions": 64}
MOE = {"num_experts": 6, "expert_width": 20}
NAMES = {
    "model.embed_tokens.": "embedding.",
    "model.norm.": "norm.",
    "lm_head.": "head.",
    "model.layers.": "blocks.",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.": "attention.",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate.": "mlp.router.",
    "mlp.experts.gate_up_proj": "mlp.experts.w_in",
    "mlp.experts.down_proj": "mlp.experts.w_out",
    "mlp.shared_expert_gate": "mlp.shared.gate",
    "mlp.shared_expert.": "mlp.shared.",
    "gate_proj": "w_gate",
    "up_proj": "w_up",
    "down_proj": "w_out",
}


def reference_model(model_type, config_type, **settings):
    """A Hugging Face model with random weights, norms and biases included."""
    config = getattr(transformers, config_type)(**{**COMMON, **settings})
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, model_type)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def copy_weights(theirs, ours):
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        state[name] = value
    for name in [name for name in state if name.endswith("experts.w_in")]:
        state[name] = state[name].view_as(ours.get_parameter(name))
    if ours.head is None:
        state.pop("head.weight")
    ours.load_state_dict(state, strict=True)


def assert_equal(theirs, config, top_k=2, renormalise=True):
    ours = Transformer(
        config,
        router=lambda: TopKRouter(config.width, config.num_experts, top_k, renormalise=renormalise),
        experts=lambda: Experts(config.num_experts, config.width, config.expert_width),
    ).eval()
    copy_weights(theirs, ours)
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    with torch.no_grad():
        logits = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), logits, rtol=1e-4, atol=1e-4)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        torch.testing.assert_close(ours(tokens, labels), loss, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    theirs = reference_model("LlamaForCausalLM", "LlamaConfig", intermediate_size=48, tie_word_embeddings=tied)
    assert_equal(theirs, ModelConfig(**OURS, ffn_width=48, norm_eps=1e-6, tie_embeddings=tied))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, LinearScaling(4.0)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        Llama3Scaling(8.0, original_positions=16),
    ),
    "yarn": (YARN, YarnScaling(4.0, original_positions=16)),
    "yarn with other ends": (
        {**YARN, "beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 1.25},
        YarnScaling(4.0, original_positions=16, beta_fast=8.0, beta_slow=0.5, attention_factor=1.25),
    ),
    "yarn of DeepSeek": (
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
        YarnScaling(4.0, original_positions=16, mscale=1.0, mscale_all_dim=0.7, truncate=False),
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_llama_with_rope_scaling(name):
    parameters, scaling = SCALINGS[name]
    theirs = reference_model(
        "LlamaForCausalLM",
        "LlamaConfig",
        intermediate_size=48,
        head_dim=16,
        rope_parameters={**parameters, "rope_theta": 5000.0},
    )
    config = ModelConfig(**OURS, ffn_width=48, norm_eps=1e-6, head_width=16, rope_theta=5000.0, rope_scaling=scaling)
    assert_equal(theirs, config)


def test_qwen3():
    theirs = reference_model(
        "Qwen3ForCausalLM", "Qwen3Config", intermediate_size=48, head_dim=16, tie_word_embeddings=False
    )
    assert_equal(theirs, ModelConfig(**OURS, ffn_width=48, norm_eps=1e-6, head_width=16, qk_norm="head"))


@pytest.mark.parametrize("window", [None, 7])
def test_mixtral(window):
    theirs = reference_model(
        "MixtralForCausalLM",
        "MixtralConfig",
        intermediate_size=20,
        num_local_experts=6,
        sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    assert_equal(theirs, ModelConfig(**OURS, **MOE, rope_theta=1e6, sliding_window=window))


def test_qwen3_moe_with_a_dense_first_layer():
    theirs = reference_model(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        num_hidden_layers=3,
        head_dim=16,
        intermediate_size=48,
        moe_intermediate_size=20,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    )
    config = ModelConfig(
        **{**OURS, "layers": 3},
        **MOE,
        ffn_width=48,
        first_k_dense=1,
        norm_eps=1e-6,
        head_width=16,
        qk_norm="head",
    )
    assert_equal(theirs, config, top_k=3)


def test_olmoe():
    theirs = reference_model(
        "OlmoeForCausalLM", "OlmoeConfig", intermediate_size=20, num_experts=6, num_experts_per_tok=3
    )
    assert_equal(theirs, ModelConfig(**OURS, **MOE, qk_norm="projection"), top_k=3, renormalise=False)


def test_qwen2_moe_with_its_gated_shared_expert_and_biases():
    theirs = reference_model(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        num_hidden_layers=4,
        intermediate_size=48,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=28,
        num_experts=6,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
    )
    config = ModelConfig(
        **{**OURS, "layers": 4},
        **MOE,
        ffn_width=48,
        moe_every=2,
        norm_eps=1e-6,
        attention_bias=True,
        shared_expert_width=28,
        shared_expert_gate=True,
    )
    assert_equal(theirs, config, renormalise=False)
