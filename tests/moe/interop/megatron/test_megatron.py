"""Checkpoints of Megatron-Core's GPTModel, against that model: its values, its logits, and its own loading."""

import json

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.moe.interop.megatron import is_megatron, open_megatron, write_megatron

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, about what Megatron calls

DENSE = {
    "plain": {},
    "groups": {"num_query_groups": 2, "kv_channels": 6},
    "norms and biases": {"num_query_groups": 2, "qk_layernorm": True, "add_qkv_bias": True},
    "tied, half turned": {
        "share_embeddings_and_output_weights": True,
        "rotary_percent": 0.5,
        "rotary_base": 5000,
        "layernorm_epsilon": 1e-3,
    },
    "squared relu": {"activation_func": "squared_relu", "gated_linear_unit": False},
    "gelu": {"activation_func": "gelu", "rotary_base": 500},
    "scaled positions": {"rope_scaling": True, "rope_scaling_factor": 4.0, "rotary_base": 500000},
    "interpolated positions": {"seq_len_interpolation_factor": 4.0},
    "sinks": {"softmax_type": "learnable"},
    "windows": {"window_size": [3, 0], "window_attn_skip_freq": [1, 0]},
}
MIXTURES = {
    "mixtral": {},
    "qwen2": {
        "moe_router_pre_softmax": True,
        "moe_shared_expert_intermediate_size": 20,
        "moe_shared_expert_gate": True,
        "moe_aux_loss_coeff": 0.01,
    },
    "deepseek v3": {
        "num_moe_experts": 8,
        "moe_router_topk": 4,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": 20,
        "moe_layer_freq": [0, 1],
        "moe_z_loss_coeff": 0.001,
    },
    "switch": {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_layer_freq": 2},
    "gpt oss": {
        "add_bias_linear": True,
        "activation_func": "quick_gelu",
        "activation_func_clamp_value": 7.0,
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
        "num_query_groups": 2,
    },
}
MODELS = {**{name: (False, fields) for name, fields in DENSE.items()}, **{n: (True, f) for n, f in MIXTURES.items()}}


@pytest.fixture
def fields_of(base, moe_base):
    return lambda name: {**(moe_base if MODELS[name][0] else base), **MODELS[name][1]}


def tokens():
    return torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(5))


def expected(state, fields):
    """Our tensors of a GPTModel's state dict, by plain loops over rows."""
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    groups = fields.get("num_query_groups") or heads
    head = fields.get("kv_channels") or width // heads
    each = heads // groups + 2
    ours = {}
    for name, value in state.items():
        if "_extra_state" in name or "inv_freq" in name:
            continue
        name = name.replace("decoder.layers.", "blocks.")
        if "linear_qkv" in name:
            rows = value.view(groups, each, head, *value.shape[1:])
            stem, part = name.split("self_attention.linear_qkv.")
            ours[f"{stem}attention.wq.{part}"] = rows[:, :-2].flatten(0, 2)
            ours[f"{stem}attention.wk.{part}"] = rows[:, -2].flatten(0, 1)
            ours[f"{stem}attention.wv.{part}"] = rows[:, -1].flatten(0, 1)
        elif "local_experts" in name:
            stem, rest = name.split("experts.local_experts.")
            expert, matrix, part = rest.split(".")
            gate = matrix == "linear_fc1" and fields["gated_linear_unit"]
            value = torch.stack(value.chunk(2)) if gate else value
            key = f"{stem}experts.{part[0]}_{'in' if matrix == 'linear_fc1' else 'out'}"
            ours.setdefault(key, []).append((int(expert), value))
        elif "linear_fc1" in name and fields["gated_linear_unit"]:
            stem = name.replace("shared_experts", "shared")
            for half, values in zip(("w_gate", "w_up"), value.chunk(2)):
                ours[stem.replace("linear_fc1", half)] = values
        else:
            for theirs, own in {
                "embedding.word_embeddings": "embedding",
                "self_attention.core_attention.softmax_offset": "attention.sinks",
                "self_attention.linear_proj": "attention.wo",
                "self_attention.q_layernorm": "attention.q_norm",
                "self_attention.k_layernorm": "attention.k_norm",
                "input_layernorm": "attention_norm",
                "pre_mlp_layernorm": "mlp_norm",
                "decoder.final_layernorm": "norm",
                "shared_experts.gate_weight": "shared.gate.weight",
                "shared_experts": "shared",
                "linear_fc1": "w_up",
                "linear_fc2": "w_out",
                "output_layer": "head",
            }.items():
                name = name.replace(theirs, own)
            ours[name] = value
    return {
        name: torch.stack([value for _, value in sorted(values, key=lambda pair: pair[0])])
        if isinstance(values, list)
        else values
        for name, values in ours.items()
    }


def without_extra(state):
    return {name: value for name, value in state.items() if "_extra_state" not in name}


def described(folder, fields):
    (folder / "transformer_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_megatron_opens_with_its_values_and_logits(megatron, fields_of, tmp_path, name):
    fields = fields_of(name)
    model = megatron.build(fields)
    folder = described(megatron.save(model, tmp_path / "saved"), fields)
    assert is_megatron(folder)
    stored = open_megatron(folder).checked()
    wanted = expected(model.state_dict(), fields)
    assert wanted.keys() == stored.tensors.keys()
    for key, value in wanted.items():
        assert torch.equal(stored.tensors[key].read(), value), key
    theirs, ours = megatron.logits(model, tokens()), stored.build()(tokens())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_loads_into_a_gpt_model(megatron, fields_of, tmp_path, name, stacked, same_bits):
    fields = fields_of(name)
    model = megatron.build(fields)
    stored = open_megatron(described(megatron.save(model, tmp_path / "saved"), fields))
    mixed = 0 < len(stored.plan().moe_layers) < 2
    out = tmp_path / "out"
    out.mkdir()
    if stacked and mixed:
        with pytest.raises(ConfigError, match="stacked=true with dense and MoE layers in one model, allowed: false"):
            write_megatron(stored, out, max_shard_bytes=20_000, stacked=True)
        assert not any(out.iterdir())
        return
    files = write_megatron(stored, out, max_shard_bytes=20_000, stacked=stacked)
    assert len(files) > 2 and all((out / file).stat().st_size < 30_000 for file in files)
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"

    said = json.loads((out / "release/transformer_config.json").read_text())
    again = megatron.load(megatron.build(said, seed=1), out / "release")
    same_bits(*(without_extra(one.state_dict()) for one in (again, model)))
    torch.testing.assert_close(megatron.logits(again, tokens()), megatron.logits(model, tokens()), rtol=1e-5, atol=1e-5)

    back = open_megatron(out).checked()
    same_bits(*({key: value.read() for key, value in held.tensors.items()} for held in (back, stored)))
    assert back.config == stored.config
