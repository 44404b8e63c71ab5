"""The same model in every layout, and by every way of describing it."""

import argparse
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from scatterfold.kernels import CheckpointError, ConfigError, DataError
from scatterfold.moe.interop.megatron import is_megatron, open_megatron, write_megatron
from scatterfold.moe.interop.open import open_model
from scatterfold.moe.interop.write import write_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LAYOUTS = {"stacked": None, "layers": {"non_homogeneous_layers": True}, "singletons": {"singleton_local_shards": True}}
SHARED = {"moe_shared_expert_intermediate_size": 20, "num_query_groups": 2}


@pytest.fixture
def fields(moe_base):
    return {**moe_base, **SHARED, "vocab_size": 62}


@pytest.fixture
def values(same_bits):
    """Raise unless two stored models hold the same values."""

    def check(one, other):
        same_bits(*({name: tensor.read() for name, tensor in held.checked().tensors.items()} for held in (one, other)))

    return check


def describe(folder, fields):
    (folder / "transformer_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_keys_holds_the_same(megatron, fields, tmp_path, layout, values):
    model = megatron.build(fields)
    plain = describe(megatron.save(model, tmp_path / "plain"), fields)
    other = describe(megatron.save(model, tmp_path / "other", LAYOUTS[layout]), fields)
    values(open_megatron(other), open_megatron(plain))


@pytest.mark.distributed
def test_what_two_ranks_saved_is_the_same(warm_python, fields, tmp_path, values):
    """Each rank holds half of the experts, or half of every matrix, loaded from ours and saved again."""
    layouts = ("expert_model_parallel_size", "tensor_model_parallel_size")
    stored = open_megatron(describe_and_write(fields, tmp_path))
    script = Path(__file__).with_name("two_ranks.py")
    words = [script, json.dumps(fields), tmp_path / "out/release", tmp_path, *layouts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([warm_python, *words], check=True, env=environment, timeout=200)
    for layout in layouts:
        two = describe(tmp_path / layout, fields)
        assert {file.name for file in two.glob("*.distcp")} >= {"__0_0.distcp", "__1_0.distcp"}
        values(open_megatron(two), stored)


def describe_and_write(fields, tmp_path):
    """A model of random values, of ours, as a checkpoint of Megatron's."""
    from scatterfold.moe.interop.huggingface.config_json import ConfigJson
    from scatterfold.moe.interop.megatron.fields import DEFAULTS
    from scatterfold.moe.interop.megatron.groups import read_groups
    from scatterfold.moe.interop.stored import StoredModel, wanted_shapes
    from scatterfold.parallel.checkpoint.lazy import in_memory

    config = read_groups(ConfigJson(tmp_path / "fields", fields, DEFAULTS))
    stored = StoredModel(tmp_path / "memory", "checkpoint", config, {}, step=3)
    torch.manual_seed(0)
    tensors = {name: in_memory(torch.randn(shape)) for name, shape in wanted_shapes(stored.plan()).items()}
    out = tmp_path / "out"
    out.mkdir()
    write_megatron(stored.with_model(config, tensors), out, max_shard_bytes=2**20)
    return out


def test_names_of_transformer_engine_and_of_nemo(fields, tmp_path, values):
    """The norm before experts by its own name alone; module. before every name; padding rows of the vocabulary."""
    from scatterfold.moe.interop.megatron.torch_dist import write_torch_dist
    from scatterfold.parallel.checkpoint.lazy import cat, constant

    stored = open_megatron(describe_and_write(fields, tmp_path))
    held = held_tensors(tmp_path / "out/release")
    assert {key.rpartition(".mlp.")[2] for key in held if "layer_norm_weight" in key and ".mlp." in key} == {
        "linear_fc1.layer_norm_weight"
    }
    renamed = {f"module.{key}": (tensor, 0) for key, tensor in held.items() if "fc1.layer_norm" not in key}
    for key in ("module.embedding.word_embeddings.weight", "module.output_layer.weight"):
        renamed[key] = (cat([renamed[key][0], constant(0.5, (2, 32))]), 0)
    renamed["optimizer.state.exp_avg.module.embedding.word_embeddings.weight"] = renamed[key]
    nemo = tmp_path / "nemo/weights"
    nemo.mkdir(parents=True)
    write_torch_dist(nemo, renamed, [], 2**20)
    describe(nemo, fields)
    assert is_megatron(tmp_path / "nemo")
    values(open_megatron(tmp_path / "nemo"), stored)


def held_tensors(weights):
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from scatterfold.moe.interop.megatron.safe import read_index
    from scatterfold.parallel.checkpoint.distributed import open_distributed

    return open_distributed(weights, read_index(weights), FileSystemReader(weights))


def test_norms_stored_around_zero(megatron, fields, tmp_path):
    model = megatron.build(fields)
    folder = describe(megatron.save(model, tmp_path / "saved"), {**fields, "layernorm_zero_centered_gamma": True})
    tensors = open_megatron(folder).checked().tensors
    state = model.state_dict()
    assert torch.equal(tensors["norm.weight"].read(), state["decoder.final_layernorm.weight"] + 1)
    assert torch.equal(
        tensors["blocks.1.mlp_norm.weight"].read(), state["decoder.layers.1.pre_mlp_layernorm.weight"] + 1
    )


# Ways to describe it


class Backend:
    """Stands in for a class of Megatron's that its arguments hold, and that reading must not need."""

    def __reduce__(self):
        return Backend, ()


def arguments(fields):
    """As Megatron-LM keeps them, its own names and all."""
    given = dict(fields)
    given |= {"padded_vocab_size": given.pop("vocab_size"), "vocab_size": 55, "attention_backend": Backend()}
    given |= {"num_experts": given.pop("num_moe_experts"), "norm_epsilon": 1e-5, "swiglu": True, "iteration": 7}
    given |= {
        "max_position_embeddings": given.pop("max_sequence_length"),
        "use_rope_scaling": False,
        "rotary_base": 900,
    }
    given |= {
        "untie_embeddings_and_output_weights": True,
        "group_query_attention": True,
        "params_dtype": torch.bfloat16,
    }
    del given["activation_func"], given["gated_linear_unit"]
    return argparse.Namespace(**given)


def test_the_arguments_of_megatron_lm_describe_it(megatron, fields, tmp_path, monkeypatch):
    from megatron.core import dist_checkpointing

    model = megatron.build({**fields, "rotary_base": 900})
    given = arguments(fields)
    common = {"args": given, "iteration": 7, "checkpoint_version": 3.0}
    folder = megatron.save(model, tmp_path / "lm/iter_0000007", None, **common)
    (tmp_path / "lm/latest_checkpointed_iteration.txt").write_text("7\n")
    monkeypatch.delattr(sys.modules[__name__], "Backend")  # nobody can import it any more
    stored = open_megatron(tmp_path / "lm").checked()
    assert stored.step == 7 and stored.config["model"]["rope_theta"] == 900
    assert stored.config["model"]["vocab_size"] == 62 and stored.config["model"]["kv_heads"] == 2
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(stored.build()(tokens), megatron.logits(model, tokens), rtol=1e-4, atol=1e-4)

    arguments_without_classes = {name: value for name, value in vars(given).items() if name != "attention_backend"}

    # Newer releases keep the same in an object among the tensors.
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    common = {"args": types.SimpleNamespace(**arguments_without_classes), "iteration": 9}
    newer = tmp_path / "newer"
    newer.mkdir()
    state = {**model.sharded_state_dict(), "common": ShardedObject("common_state", common, (1,), (0,))}
    dist_checkpointing.save(state, str(newer))
    (newer / "common.pt").unlink()
    again = open_megatron(newer).checked()
    assert again.step == 9 and again.config == stored.config
    assert folder.is_dir()


def test_the_run_config_of_megatron_bridge_describes_it(megatron, fields, tmp_path):
    model = dict(fields)
    model["activation_func"] = {"_target_": "torch.nn.functional.silu", "_call_": False}
    model["seq_length"] = model.pop("max_sequence_length")
    folder = megatron.save(megatron.build(fields), tmp_path / "saved")
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": model, "train": {"train_iters": 5}}))
    stored = open_megatron(folder).checked()
    described = open_megatron(describe(folder, fields))
    assert stored.config == described.config
    (folder / "run_config.yaml").write_text("model: !!python/object/apply:os.system ['true']")
    (folder / "transformer_config.json").unlink()
    with pytest.raises(CheckpointError, match="run_config.yaml is damaged: it is not plain YAML"):
        open_megatron(folder)


def test_the_user_describes_it(megatron, fields, tmp_path, values):
    folder = megatron.save(megatron.build(fields), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="does not say which model it holds, allowed: transformer_config.json or"):
        open_megatron(folder)
    wanted = open_megatron(describe(folder, fields))
    (folder / "transformer_config.json").unlink()
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump({name: dict(wanted.config[name]) for name in ("model", "router", "experts")}))
    values(open_model(folder, describe=file), wanted)
    for text, message in {
        "model: {layers: 2}\nrouter: {}": "has no experts, allowed: groups model, router",
        "- a": "has no model, allowed",
        "model: {": "is not YAML",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"describe={file} {message}"):
            open_megatron(folder, file)
    with pytest.raises(ConfigError, match="describe=.*absent.yaml cannot be read"):
        open_megatron(folder, tmp_path / "absent.yaml")


# Written by commands


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_run_goes_there_and_back(run, tmp_path, values, dtype):
    """The expert bias, the tokenizer and the step too; the folder is one of Megatron's alone."""
    config = open_model(run).config
    stored = open_model(run)
    router = {**config["router"], "score": "sigmoid"}
    stored = stored.with_model({**config, "router": router}, stored.tensors)
    receipt = write_model(stored, tmp_path / "out", "megatron", dtype)
    assert receipt.files == ("release/__0_0.distcp",) and receipt.step == 4
    for folder in (tmp_path / "out", tmp_path / "out/release"):
        back = open_model(folder)
        assert back.format == "megatron" and back.step == 4 and back.config == stored.config
        assert back.tokenizer.spec()["vocab_size" if "vocab_size" in back.tokenizer.spec() else "path"]
        assert back.tokenizer.vocab_size == stored.tokenizer.vocab_size
    if dtype is None:
        values(back, stored)
    else:
        assert back.tensors["head.weight"].dtype == torch.bfloat16
        assert back.tensors["blocks.1.mlp.router.expert_bias"].dtype == torch.float32
    write_model(back, tmp_path / "again", "megatron")
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "release").iterdir() if file.name != "common.pt"}
        for name in ("out", "again")
    )
    assert first == second


def test_ranks_write_the_same_bytes_as_one(fields, tmp_path):
    stored = open_megatron(describe_and_write(fields, tmp_path))
    folders = []
    for world in (1, 3):
        out = tmp_path / f"by-{world}"
        out.mkdir()
        for rank in range(world):
            write_megatron(stored, out, 30_000, rank=rank, world=world)
        folders.append({str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()})
    assert folders[0] == folders[1] and len(folders[0]) > 8


def test_reading_and_writing_need_nothing_of_megatron(fields, tmp_path, monkeypatch):
    for name in ["megatron", *sys.modules]:
        if name.partition(".")[0] == "megatron":
            monkeypatch.setitem(sys.modules, name, None)  # its import fails
    source = describe_and_write(fields, tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    write_megatron(open_megatron(source).checked(), copy, 2**20)
    for file in ("__0_0.distcp", ".metadata"):
        assert (copy / "release" / file).read_bytes() == (source / "release" / file).read_bytes()


# Refusals


class Bomb:
    def __reduce__(self):
        return Bomb.call, (str(Bomb.target),)


def touch(path):
    Path(path).touch()


@pytest.mark.parametrize("call", [touch, os.mkdir])
def test_nothing_in_the_arguments_runs(fields, tmp_path, call):
    """What is no class of torch's is never imported, and what may be harmful not even passed over."""
    weights = describe_and_write(fields, tmp_path) / "release"
    (weights / "scatterfold.json").unlink()
    Bomb.target, Bomb.call = tmp_path / "ran", staticmethod(call)
    torch.save({"args": Bomb(), "iteration": 5}, weights / "common.pt")
    if call is touch:
        assert open_megatron(weights).step == 5
    else:
        with pytest.raises(CheckpointError, match="common.pt cannot be read: .* GLOBAL posix.mkdir"):
            open_megatron(weights)
    assert not Bomb.target.exists()


@pytest.mark.parametrize("call", [touch, os.mkdir])
def test_nothing_in_the_index_runs(fields, tmp_path, call):
    weights = describe_and_write(fields, tmp_path) / "release"
    Bomb.target, Bomb.call = tmp_path / "ran", staticmethod(call)
    index = pickle.loads((weights / ".metadata").read_bytes())
    index.planner_data = Bomb()
    (weights / ".metadata").write_bytes(pickle.dumps(index))
    open_megatron(weights).checked()
    assert not Bomb.target.exists()


REFUSED = {
    "multi_latent_attention": (True, "false"),
    "normalization": ("LayerNorm", '"RMSNorm"'),
    "position_embedding_type": ("learned_absolute", "rope"),
    "add_bias_linear": (True, "false: a dense MLP has no biases here"),
    "activation_func": ("tanh", '"silu", "gelu", "relu", "quick_gelu", "squared_relu"'),
    "softmax_type": ("off-by-one", '"vanilla", "learnable"'),
    "moe_router_score_function": ("sqrtsoftplus", '"softmax", "sigmoid"'),
    "moe_router_load_balancing_type": ("sinkhorn", "aux_loss, seq_aux_loss, global_aux_loss, none"),
    "moe_expert_capacity_factor": (1.5, "null"),
    "moe_layer_freq": ([1], "a number, or a list of 0 and 1 of 2 layers"),
    "window_size": ([3, 4], "null, or two numbers"),
    "mtp_num_layers": (1, "0"),
    "rotary_interleaved": (True, "false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_asks_for_what_we_do_not_have(fields, tmp_path, name):
    weights = describe_and_write(fields, tmp_path) / "release"
    (weights / "scatterfold.json").unlink()
    value, allowed = REFUSED[name]
    describe(weights, {**fields, name: value})
    with pytest.raises(CheckpointError) as caught:
        open_megatron(weights)
    assert f"transformer_config.json: {name}={json.dumps(value)} is not supported, allowed: {allowed}" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def damage_tracker(out):
    (out / "latest_checkpointed_iteration.txt").write_text("iter 5")


def name_no_folder(out):
    (out / "latest_checkpointed_iteration.txt").write_text("12")


def change_backend(out):
    (out / "release/metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


def lose_backend(out):
    (out / "release/metadata.json").unlink()


def lose_index(out):
    (out / "release/.metadata").unlink()


def damage_index(out):
    file = out / "release/.metadata"
    file.write_bytes(file.read_bytes()[:500])


def lose_file(out):
    (out / "release/__0_0.distcp").unlink()


def damage_common(out):
    (out / "release/common.pt").write_bytes(b"PK nonsense")


def lose_layer(out):
    change(out, num_layers=3)


def lose_experts(out):
    change(out, num_moe_experts=None, ffn_hidden_size=24)


def widen(out):
    change(out, hidden_size=64)


def forget_width(out):
    change(out, hidden_size=None)


def make_impossible(out):
    change(out, moe_router_topk=9)


def make_old(out):
    (out / "release/mp_rank_00").mkdir()
    (out / "release/mp_rank_00/model_optim_rng.pt").write_bytes(b"")


def change(out, **fields):
    weights = out / "release"
    (weights / "scatterfold.json").unlink()
    given = json.loads((weights / "transformer_config.json").read_text()) | fields
    describe(weights, {name: value for name, value in given.items() if value is not None})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damage_tracker,
            "latest_checkpointed_iteration.txt is damaged: 'iter 5', allowed: a number of steps, or release",
        ),
        (name_no_folder, "iter_0000012 is missing, but .* names it"),
        (change_backend, "sharded_backend=zarr version 1, allowed: torch_dist version 1"),
        (lose_backend, "has no metadata.json, so it is not whole or not of the format torch_dist"),
        (lose_index, ".metadata is missing"),
        (damage_index, ".metadata is damaged"),
        (lose_file, "__0_0.distcp is missing, but .* names it"),
        (damage_common, "common.pt cannot be read"),
        (make_old, "is a checkpoint of Megatron's old format"),
        (lose_layer, "lacks decoder.layers.2.input_layernorm.weight, allowed: a checkpoint with all tensors"),
        (lose_experts, "lacks decoder.layers.0.mlp.linear_fc1.weight"),
        (widen, r"embedding.word_embeddings.weight is \(62, 32\), allowed: \(62, 64\), which its description asks for"),
        (forget_width, "transformer_config.json has no hidden_size, allowed: a whole number"),
        (make_impossible, "describes a model that cannot be built: router.top_k=9 is larger"),
    ],
)
def test_a_checkpoint_that_is_not_whole_or_does_not_fit(fields, tmp_path, damage, message):
    out = describe_and_write(fields, tmp_path)
    damage(out)
    assert is_megatron(out)
    with pytest.raises((CheckpointError, DataError), match=message) as caught:
        open_megatron(out)
    assert "\n" not in str(caught.value)


UNSAYABLE = {
    "model.qk_norm": ({"model": {"qk_norm": "projection"}}, "projection does not fit megatron, allowed: none, head"),
    "model.attention_output_bias": (
        {"model": {"attention_output_bias": True}},
        "true does not fit megatron, allowed: false",
    ),
    "router.renormalise": ({"router": {"score": "sigmoid", "renormalise": False}}, "false does not fit megatron"),
    "router.bias_rate": ({"router": {"bias_rate": 0.1}}, "0.1 does not fit megatron, allowed: null with score=softmax"),
    "router._target_": (
        {"router": {"_target_": "scatterfold.moe.routers.ThresholdRouter", "threshold": 0.5}},
        "allowed",
    ),
    "experts.activation": (
        {"experts": {"activation": "geglu"}},
        "geglu does not fit megatron, allowed: model.activation",
    ),
}


@pytest.mark.parametrize("field", UNSAYABLE)
def test_a_model_that_megatron_cannot_say(fields, tmp_path, field):
    stored = open_megatron(describe_and_write(fields, tmp_path))
    changes, message = UNSAYABLE[field]
    config = {group: {**stored.config[group], **changes.get(group, {})} for group in stored.config}
    if "_target_" in changes.get("router", {}):
        config["router"] = changes["router"]
    out = tmp_path / "unsaid"
    out.mkdir()
    with pytest.raises(ConfigError, match=f"{field}=.*{message}"):
        write_megatron(stored.with_model(config, stored.tensors), out, 2**20)
    assert not any(out.iterdir())
