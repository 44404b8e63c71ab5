"""Tiny models of transformers' own classes, the independent reference of this folder's tests."""

import torch
import transformers
from safetensors.torch import load_file

from scatterfold.moe.interop.huggingface import open_huggingface, write_huggingface

VOCABULARY = 61
LIMIT = 1e-5  # of the relative difference of logits in float32
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
QWEN_MOE = {"num_hidden_layers": 3, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 7}
CASES = {
    "llama": ("llama", {"intermediate_size": 48}),
    "llama, tied, other head width": (
        "llama",
        {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama, all heads alike, gelu, linear rope": (
        "llama",
        {
            "num_key_value_heads": None,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
        },
    ),
    "llama, biases": ("llama", {"attention_bias": True}),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "mistral, no window, yarn": (
        "mistral",
        {"sliding_window": None, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}},
    ),
    "qwen2": ("qwen2", {"rope_parameters": {**YARN, "beta_fast": 8.0, "attention_factor": 1.25}}),
    "qwen2, tied, window in all layers": ("qwen2", {"tie_word_embeddings": True, "max_window_layers": 0, **WINDOW}),
    "qwen3": ("qwen3", {"head_dim": 16, "hidden_act": "relu"}),
    "qwen2, window in the last layers": ("qwen2", {"num_hidden_layers": 3, "max_window_layers": 2, **WINDOW}),
    "qwen3, window by layer types, biases": (
        "qwen3",
        {"head_dim": 6, "attention_bias": True, "layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 6, "router_jitter_noise": 0.1}),
    "mixtral, window, head width, one expert a token": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 1, "head_dim": 10, "sliding_window": 7, "hidden_act": "gelu"},
    ),
    "qwen2_moe": ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 28}),
    "qwen2_moe, dense layers, no biases, renormalised": (
        "qwen2_moe",
        {
            **QWEN_MOE,
            "shared_expert_intermediate_size": 12,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe, window in every other layer": (
        "qwen2_moe",
        {**QWEN_MOE, "shared_expert_intermediate_size": 12, "max_window_layers": 2, **WINDOW},
    ),
    "qwen3_moe": ("qwen3_moe", {**QWEN_MOE, "head_dim": 16, "norm_topk_prob": True, "rope_parameters": YARN}),
    "qwen3_moe, dense layers here and there": (
        "qwen3_moe",
        {**QWEN_MOE, "mlp_only_layers": [1], "attention_bias": True, **WINDOW},
    ),
    "qwen3_moe, dense layers first": ("qwen3_moe", {**QWEN_MOE, "mlp_only_layers": [0], "tie_word_embeddings": True}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe, renormalised": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "olmoe, biases": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "attention_bias": True}),
}
LATENT = {
    **{"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10, "num_key_value_heads": 4},
    **{"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3},
    "moe_intermediate_size": 20,
}
DEEP_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}
GLM = {
    **{"num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
    "head_dim": 8,
}
GPT = {"head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 5, "num_hidden_layers": 3}
CASES |= {
    "deepseek_v2": ("deepseek_v2", {**LATENT, "q_lora_rank": 16}),
    "deepseek_v2, lite, yarn": ("deepseek_v2", {**LATENT, "q_lora_rank": None, "rope_parameters": DEEP_YARN}),
    "deepseek_v2, groups, biases": (
        "deepseek_v2",
        {
            **{**LATENT, "q_lora_rank": 16, "attention_bias": True, "first_k_dense_replace": 0},
            **{"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7},
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "q_lora_rank": 16, "n_group": 4, "topk_group": 2}),
    "deepseek_v3, halves, not renormalised, yarn, biases": (
        "deepseek_v3",
        {
            **{**LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False},
            **{"norm_topk_prob": False, "n_shared_experts": 2, "attention_bias": True, "rope_parameters": DEEP_YARN},
        },
    ),
    "glm4_moe": ("glm4_moe", GLM),
    "glm4_moe, norms, biases, groups, all of a head turns": (
        "glm4_moe",
        {
            **{**GLM, "use_qk_norm": True, "attention_bias": True, "n_group": 2, "topk_group": 1},
            **{"partial_rotary_factor": 1.0, "routed_scaling_factor": 2.5, "n_shared_experts": 2},
        },
    ),
    "glm4_moe, a quarter turns, yarn": (
        "glm4_moe",
        {**GLM, "num_hidden_layers": 2, "rope_parameters": {**YARN, "partial_rotary_factor": 0.25}},
    ),
    "gpt_oss": ("gpt_oss", GPT),
    "gpt_oss, no biases, its own windows and rope": (
        "gpt_oss",
        {
            **{**GPT, "attention_bias": False, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt_oss, no windows": ("gpt_oss", {**GPT, "layer_types": ["full_attention"] * 3}),
    "gpt_oss, windows everywhere": ("gpt_oss", {**GPT, "layer_types": ["sliding_attention"] * 3}),
}
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "olmoe": "Olmoe",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "glm4_moe": "Glm4Moe",
    "gpt_oss": "GptOss",
}


def make(model_type, dtype=torch.float32, **settings):
    """Their model with random weights, norms and biases included."""
    stem = CLASSES[model_type]
    config = getattr(transformers, f"{stem}Config")(**{**TINY, **settings})
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3, generator=generator)
    return model.to(dtype)


def save(model, folder, fused=False, shards=None):
    """In their own way: per expert as on the hub, or fused as in memory."""
    size = {} if shards is None else {"max_shard_size": shards}
    model.save_pretrained(folder, save_original_format=not fused, **size)
    return folder


def load(folder):
    """Their model of a folder; raises unless every key is used and none is missing."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, experts_implementation="eager"
    )
    wrong = {name: keys for name, keys in report.items() if keys}
    assert not wrong, wrong
    return model.eval()


def write(stored, folder, max_shard_bytes=10**9, **options):
    folder.mkdir()
    write_huggingface(stored, folder, max_shard_bytes, **options)
    return folder


def opened(folder):
    """What `open_huggingface` makes of a folder, checked."""
    return open_huggingface(folder).checked()


def weights(folder):
    """All tensors of a folder, by the library's own reader."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def values(stored):
    return {name: tensor.read() for name, tensor in stored.tensors.items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def assert_same_model(theirs, ours, limit=LIMIT):
    """Logits, and the experts that every token takes in every layer."""
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    chosen, hooks = {"theirs": [], "ours": []}, []
    for module in theirs.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            hooks.append(module.register_forward_hook(lambda _, __, out: chosen["theirs"].append(_one_hot(out[2]))))
    for _, layer in ours.moe_layers():
        hooks.append(layer.router.register_forward_hook(lambda _, __, out: chosen["ours"].append(_table(out.routing))))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    for hook in hooks:
        hook.remove()
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < limit, error
    assert len(chosen["theirs"]) == len(chosen["ours"]) == len(ours.moe_layers())
    for layer, (one, other) in enumerate(zip(chosen["theirs"], chosen["ours"])):
        assert one == other, layer
    return error


def _one_hot(indices):
    return [sorted(row) for row in indices.tolist()]


def _table(routing):
    rows = [[] for _ in range(routing.token_offsets.numel() - 1)]
    offsets = routing.expert_offsets.tolist()
    for expert, (start, stop) in enumerate(zip(offsets, offsets[1:])):
        for token in routing.token[start:stop].tolist():
            rows[token].append(expert)
    return rows
