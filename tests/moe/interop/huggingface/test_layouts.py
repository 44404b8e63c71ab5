"""Layouts of experts, dtypes, spellings and what is read of a folder."""

import dataclasses
import json

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from scatterfold.moe.interop.huggingface import ARCHITECTURES, open_huggingface  # noqa: E402
from scatterfold.tests.moe.interop.huggingface.reference import (  # noqa: E402
    CASES,
    CLASSES,
    LLAMA3,
    YARN,
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

MIXTURES = {"mixtral": "mixtral", "qwen2_moe": "qwen2_moe", "qwen3_moe": "qwen3_moe", "olmoe": "olmoe"}


def rewrite(folder, remove=(), **changes):
    """Change a config.json."""
    described = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in described.items() if key not in remove}
    (folder / "config.json").write_text(json.dumps({**kept, **changes}))


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_either_layout_and_in_bfloat16(name, tmp_path):
    model_type, settings = CASES[name]
    theirs = make(model_type, torch.bfloat16, **settings)
    apart, fused = save(theirs, tmp_path / "apart"), save(theirs, tmp_path / "fused", fused=True, shards="20KB")
    assert any(".experts.0." in key for key in weights(apart))
    assert any(key.endswith(".mlp.experts.gate_up_proj") for key in weights(fused))
    stored = opened(apart)
    assert {tensor.dtype for tensor in stored.tensors.values()} == {torch.bfloat16}
    assert_same_bits(values(opened(fused)), values(stored))

    for source in (apart, fused):
        for layout, expected in ((False, apart), (True, fused)):
            back = write(opened(source), tmp_path / f"{source.name} {layout}", 30_000, fused=layout)
            assert_same_bits(weights(back), weights(expected))
            described = json.loads((back / "config.json").read_text())
            assert described["torch_dtype"] == described["dtype"] == "bfloat16"
            assert described["num_experts"] == described["num_local_experts"] == 6
    assert_same_bits(load(back).state_dict(), theirs.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_one_slice_reads_no_more_than_it_needs(fused, tmp_path, monkeypatch):
    model_type, settings = CASES["mixtral"]
    theirs = make(model_type, **settings)
    folder = save(theirs, tmp_path / "model", fused=fused, shards="10KB")
    stored = opened(folder)
    touched = []

    class Watched:
        """The library's reader, which notes what is asked of it."""

        def __init__(self, file, framework):
            self._opened = real(file, framework=framework)

        def __enter__(self):
            self._opened.__enter__()
            return self

        def __exit__(self, *error):
            return self._opened.__exit__(*error)

        def get_slice(self, key):
            touched.append(key)
            return self._opened.get_slice(key)

    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    name = "blocks.1.mlp.experts.w_in"
    part = stored.tensors[name].read([slice(2, 4), slice(1, 2), slice(3, 9), slice(0, 32)])
    whole = theirs.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    torch.testing.assert_close(part[:, 0], whole[2:4, 24 + 3 : 24 + 9], rtol=0, atol=0)
    prefix = "model.layers.1."
    if fused:
        assert touched == [f"{prefix}mlp.experts.gate_up_proj"]
    else:
        assert touched == [f"{prefix}block_sparse_moe.experts.{expert}.w3.weight" for expert in (2, 3)]
    for index in ([slice(0, 6), slice(0, 2), slice(0, 24), slice(5, 9)], [slice(4, 4), *[slice(0, 2)] * 3]):
        expected = whole.unflatten(1, (2, 24))[tuple(index)]
        assert torch.equal(stored.tensors[name].read(index), expected)


@pytest.mark.parametrize("kind", ["none", "linear", "llama3", "yarn", "yarn without factor"])
def test_a_config_as_transformers_4_wrote_it(kind, tmp_path):
    """rope_theta and rope_scaling beside it, `type` for rope_type, torch_dtype alone, no head_dim."""
    scaling = {
        "none": None,
        "linear": {"type": "linear", "factor": 4.0},
        "llama3": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
        "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": None},
        "yarn without factor": {"type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    }[kind]
    folder = save(make("llama"), tmp_path / "model")
    rewrite(folder, remove=("rope_parameters", "dtype", "head_dim"), rope_theta=5000.0, rope_scaling=scaling)
    rewrite(folder, torch_dtype="float32", _name_or_path="somewhere", use_cache=False, unsloth_version="1")
    theirs = load(folder)
    stored = opened(folder)
    assert stored.config["model"]["rope_theta"] == 5000.0
    assert_same_model(theirs, stored.build())
    again = write(stored, tmp_path / "again")
    assert_same_model(load(again), stored.build())
    described = json.loads((again / "config.json").read_text())
    assert described["unsloth_version"] == "1" and described["use_cache"] is False
    assert "_name_or_path" not in described
    rewrite(again, remove=("rope_parameters",))  # a reader of the old spelling
    assert opened(again).plan() == stored.plan()
    assert_same_model(load(again), stored.build())


def test_rope_scaling_wins_over_rope_parameters_and_inside_over_outside(tmp_path):
    folder = save(make("llama", rope_parameters=YARN), tmp_path / "model")
    rewrite(folder, rope_scaling={"type": "linear", "factor": 3.0, "rope_theta": 700.0}, rope_theta=9.0)
    assert_same_model(load(folder), opened(folder).build())
    rewrite(folder, remove=("rope_scaling",), original_max_position_embeddings=32)
    assert_same_model(load(folder), opened(folder).build())


@pytest.mark.parametrize("present", ["embedding", "head", "both"])
def test_tied_embeddings_under_either_key(present, tmp_path):
    theirs = make("qwen3", tie_word_embeddings=True)
    folder = save(theirs, tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    embedding = held.pop("model.embed_tokens.weight")
    if present != "head":
        held["model.embed_tokens.weight"] = embedding.clone()
    if present != "embedding":
        held["lm_head.weight"] = embedding.clone()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    stored = opened(folder)
    assert "head.weight" not in stored.tensors
    assert_same_model(theirs, stored.build())
    assert set(weights(write(stored, tmp_path / "back"))) == set(weights(save(theirs, tmp_path / "again")))


def test_buffers_that_old_versions_saved_are_left_out(tmp_path):
    folder = save(make("llama"), tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    save_file(
        {**held, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert len(opened(folder).tensors) == len(held)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_the_number_of_experts_by_either_name(model_type, name, tmp_path):
    folder = save(make(*CASES[model_type][:1], **CASES[model_type][1]), tmp_path / "model")
    rewrite(folder, remove=("num_experts", "num_local_experts"), **{name: 6})
    assert opened(folder).config["model"]["num_experts"] == 6


@pytest.mark.parametrize("model_type", CLASSES)
def test_defaults_are_those_of_their_config_classes(model_type):
    config = getattr(transformers, f"{CLASSES[model_type]}Config")
    theirs = {field.name: field.default for field in dataclasses.fields(config)}
    theirs |= {"rope_theta": config().rope_parameters["rope_theta"]}
    for key, value in ARCHITECTURES[model_type].defaults.items():
        if key in theirs:
            assert value == theirs[key], key
        else:  # what the class does not know, or another class of the table alone
            assert value in (None, False), key


def test_what_says_nothing_about_the_computation_goes_along(tmp_path):
    folder = save(make("mistral"), tmp_path / "model")
    rewrite(folder, eos_token_id=[3, 4], bos_token_id=2, attention_dropout=0.1, transformers_version="4.57.0")
    (folder / "generation_config.json").write_text('{"temperature": 0.25}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    stored = open_huggingface(folder)
    assert stored.format == "huggingface" and stored.step == 0 and stored.tokenizer is None
    assert sorted(stored.carried) == ["chat_template.jinja", "generation_config.json"]
    back = write(stored, tmp_path / "back")
    names = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in back.iterdir()) == names
    described = json.loads((back / "config.json").read_text())
    kept = {key: described[key] for key in ("eos_token_id", "bos_token_id", "attention_dropout")}
    assert kept == {"eos_token_id": [3, 4], "bos_token_id": 2, "attention_dropout": 0.1}
    assert json.loads((back / "generation_config.json").read_text()) == {"temperature": 0.25}
