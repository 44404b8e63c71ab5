"""`scatterfold upcycle`, to folders that transformers loads."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from scatterfold.moe.interop import open_model  # noqa: E402

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FINE = ["method=fine_grained", "granularity=4", "experts=8", "top_k=4"]
# model type of the source, further keys, arguments, model type of the result
CASES = {
    "llama": ("llama", {}, [], "mixtral"),
    "llama, raw weights": ("llama", {}, ["renormalise=false"], "qwen2_moe"),
    "mistral, cut": ("mistral", {"sliding_window": 9}, FINE, "mixtral"),
    "qwen2": ("qwen2", {}, [], "qwen2_moe"),
    "qwen2, raw weights, cut": ("qwen2", {}, [*FINE, "renormalise=false"], "qwen2_moe"),
    "qwen2, shared, gated": (
        "qwen2",
        {"tie_word_embeddings": True},
        ["method=shared", "granularity=4", "shared_shards=2", "shared_gate=true", "experts=8"],
        "qwen2_moe",
    ),
    "qwen3, every other layer": ("qwen3", {"head_dim": 16}, ["layers=every_other"], "qwen3_moe"),
    "qwen3, two layers, cut, gelu": (
        "qwen3",
        {"head_dim": 16, "hidden_act": "gelu"},
        ["layers=[0,2]", *FINE],
        "qwen3_moe",
    ),
    "qwen3, raw weights": ("qwen3", {}, ["renormalise=false", "scale=down"], "qwen3_moe"),
}


def save(folder, model_type, **keys):
    """A tiny dense model of transformers' own class, whose weights are large enough to tell logits apart."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**TINY, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if parameter.ndim > 1 else 0.1)
    model.save_pretrained(folder)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))).logits


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_result_and_computes_what_the_dense_model_did(scatterfold, tmp_path, case):
    source, keys, words, target = CASES[case]
    dense = save(tmp_path / "dense", source, **keys)
    outcome = scatterfold("upcycle", "source=dense", "output=moe", "json=receipt.json", *words)
    assert outcome.code == 0, outcome.err
    moe = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    assert moe.config.model_type == target
    expected = logits(dense)
    assert float((logits(moe) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["plan"]["exact"] and receipt["measured"]["exact"] and receipt["written"]["to"] == "huggingface"
    assert receipt["plan"]["after"]["parameters"] == receipt["written"]["parameters"]
    assert receipt["plan"]["before"]["parameters"] == sum(p.numel() for p in dense.parameters())


def test_bfloat16_stays_and_the_source_is_not_touched(scatterfold, tmp_path):
    save(tmp_path / "dense", "llama").to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    before = {path.name: path.read_bytes() for path in (tmp_path / "narrow").iterdir()}
    outcome = scatterfold("upcycle", "source=narrow", "output=moe", "max_shard_bytes=100000")
    assert outcome.code == 0 and "(bf16)" in outcome.out
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) > 1
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "narrow").iterdir()}
    assert {tensor.dtype for tensor in open_model(tmp_path / "moe").tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("flag", ["--dry-run", "dry_run=true"])
def test_a_dry_run_writes_nothing(scatterfold, tmp_path, flag):
    save(tmp_path / "dense", "llama")
    before = sorted(tmp_path.rglob("*"))
    outcome = scatterfold("upcycle", "source=dense", flag, "experts=16", "gpus=4")
    assert outcome.code == 0 and sorted(tmp_path.rglob("*")) == before
    names = {line.split()[0]: line for line in outcome.out.splitlines()}
    assert {"parameters", "active", "FLOPs", "training", "exact"} <= names.keys() and "output" not in names
    assert "on each of 4 GPUs" in names["training"] and "huggingface, mixtral" in names["format"]


def test_a_run_is_written_as_our_own_folder_and_trains_on(scatterfold, tmp_path, tiny):
    dense = ["model.num_experts=0", "run_dir=dense", "logger.display=none"]
    assert scatterfold("train", *tiny, *dense).code == 0
    words = ["method=drop", "optimizer=reset", "experts=4", "share=0.25"]
    outcome = scatterfold("upcycle", "source=dense", "output=moe", "json=receipt.json", *words)
    assert outcome.code == 0 and "on purpose" in outcome.out
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert not receipt["plan"]["exact"] and not receipt["measured"]["exact"]
    assert receipt["measured"]["probe"] == "text" and receipt["measured"]["loss"] > 0
    made = open_model(tmp_path / "moe")
    assert made.format == "scatterfold" and made.config["model"]["num_experts"] == 4 and not made.optimizer
    run = ["init_from=moe", "trainer.steps=1", "run_dir=run", "logger.display=none"]
    assert scatterfold("train", *[word for word in tiny if not word.startswith("model")], *run).code == 0


def test_moments_go_with_the_weights_into_the_next_run(scatterfold, tmp_path, tiny):
    dense = ["model.num_experts=0", "run_dir=dense", "logger.display=none"]
    assert scatterfold("train", *tiny, *dense).code == 0
    outcome = scatterfold("upcycle", "source=dense", "output=moe", "experts=4", "optimizer=carry", "probe=false")
    assert outcome.code == 0 and "with the optimizer's state" in outcome.out and "difference" not in outcome.out
    run = ["init_from=moe", "init_optimizer=true", "trainer.steps=1", "run_dir=run", "logger.display=none"]
    assert scatterfold("train", *[word for word in tiny if not word.startswith("model")], *run).code == 0
    steps = {
        name: float(tensor.read())
        for name, tensor in open_model(tmp_path / "run").optimizer.items()
        if name.endswith(".step")
    }
    assert steps["blocks.0.mlp.experts.w_in.step"] == 5 and steps["blocks.0.mlp.router.weight.step"] == 1


def test_several_sources_are_mixed(scatterfold, tmp_path):
    save(tmp_path / "a", "llama")
    save(tmp_path / "b", "llama", rope_theta=5000.0)
    save(tmp_path / "c", "llama", hidden_size=64)
    outcome = scatterfold("upcycle", "source=[a,a]", "output=moe", "method=branch_train_mix", "experts=4")
    assert outcome.code == 0 and outcome.out.count("difference") == 2
    outcome = scatterfold("upcycle", "source=[a,c]", "output=no", "method=branch_train_mix")
    assert outcome.code == 2 and "source=c has model.width=64, but a has 32" in outcome.line
    assert not (tmp_path / "no").exists()


def test_what_is_wrong_is_one_line_and_leaves_nothing(scatterfold, tmp_path):
    save(tmp_path / "dense", "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    for words, expected in (
        (["source=nowhere", "output=x"], "nowhere does not exist"),
        (["source=dense"], "output is missing"),
        (["source=dense", "output=full"], "output=full is not empty"),
        (["source=dense", "output=full", "--dry-run"], "output=full is not empty"),
        (["source=dense", "output=dense/x"], "output=dense/x lies in its source"),
        (["source=dense", "output=x", "method=spars"], "method=spars is unknown"),
        (["source=dense", "output=x", "layers=[1,x]"], "layers=[1,x] is unknown, allowed: all, every_other"),
        (["source=dense", "output=x", "layers=[0,3]"], "layers=[0, 3] does not fit a model of 3 layers"),
        (["source=dense", "output=x", "top_k=3", "method=fine_grained", "granularity=2"], "top_k=3 is not a multiple"),
        (["source=dense", "output=x", "router=threshold"], "does not fit mixtral, allowed: "),
        (["source=dense", "output=x", "router=threshold"], ", or to=scatterfold"),
        (["source=dense", "output=x", "method=adapter"], "experts._target_=scatterfold.moe.AdapterExperts"),
        (["source=dense", "output=x", "layers=every_other", "architecture=mixtral"], "does not fit mixtral"),
        (["source=dense", "output=x", "optimizer=carry"], "holds no optimizer state"),
        (["source=dense", "output=x", "to=hugging"], "to=hugging is unknown (did you mean huggingface?)"),
        (["source=dense", "output=x", "dtype=fp8"], "dtype=fp8 is unknown"),
        (["source=dense", "output=x", "json=no/x.json"], "no/x.json cannot be written"),
        (["source=dense", "output=x", "--dryrun"], "'--dryrun' is not an argument"),
    ):
        outcome = scatterfold("upcycle", *words)
        assert outcome.code == 2, words
        assert expected in outcome.line
        assert sorted(tmp_path.rglob("*")) == before, words


def test_a_threshold_router_is_written_as_our_own_folder(scatterfold, tmp_path):
    save(tmp_path / "dense", "llama")
    words = ["router=threshold", "threshold=0.6", "top_k=4", "to=scatterfold"]
    outcome = scatterfold("upcycle", "source=dense", "output=moe", *words)
    assert outcome.code == 0 and "threshold 0.6, at most 4 per token" in outcome.out
    assert open_model(tmp_path / "moe").plan().make_router().max_experts_per_token == 4
