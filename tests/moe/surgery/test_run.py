"""From folder to folder: Hugging Face models with experts removed by hand, receipts, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from scatterfold.kernels import CheckpointError, ConfigError, DataError
from scatterfold.moe.data import ByteTokenizer
from scatterfold.moe.interop.open import open_model
from scatterfold.moe.interop.write import write_model
from scatterfold.moe.surgery import Grow, Job, Merge, Prune, operate
from scatterfold.moe.surgery.corpus import loss_of, open_corpus

KEPT = (1, 4, 5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "surgery-cache"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **{"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64, "num_local_experts": 6},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "sliding_window": None},
    )
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_()
    folder = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(folder)
    return folder, model


def without_others(model, experts, top_k=2):
    """The same model of transformers with these experts only."""
    config = transformers.MixtralConfig.from_dict(
        {**model.config.to_dict(), "num_local_experts": len(experts), "num_experts_per_tok": top_k}
    )
    config._experts_implementation = "eager"
    smaller = transformers.MixtralForCausalLM(config).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        if ".experts." in name or ".gate.weight" in name:
            state[name] = tensor[list(experts)]
    smaller.load_state_dict(state)
    return smaller


def logits_of(model):
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("experts", [KEPT, (2,)])
def test_a_hugging_face_folder_with_experts_removed_is_their_model_without_them(tmp_path, mixtral, experts):
    """Of one expert, transformers loads a dense model: its weights always summed to one."""
    folder, model = mixtral
    receipt = operate(Job(folder, tmp_path / "out"), Prune(experts=experts))
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = without_others(model, experts, min(2, len(experts)))
    torch.testing.assert_close(logits_of(made), logits_of(expected), rtol=1e-5, atol=1e-5)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["model_type"] == ("mixtral" if len(experts) > 1 else "llama")
    assert receipt.format == ("huggingface", "huggingface") and receipt.corpus is None
    assert receipt.before.parameters == sum(p.numel() for p in model.parameters())
    assert receipt.after.parameters == sum(p.numel() for p in made.parameters())
    assert receipt.measured is not None and receipt.measured.largest_difference > 0.01
    assert json.loads(json.dumps(receipt.record()))["layers"] == {str(i): [[e] for e in experts] for i in (0, 1)}


def test_a_grown_hugging_face_folder_computes_the_same(tmp_path, mixtral):
    folder, model = mixtral
    receipt = operate(Job(folder, tmp_path / "out"), Grow(12))
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(made), logits_of(model), rtol=1e-4, atol=1e-5)
    assert made.config.num_experts_per_tok == 4 and receipt.measured.largest_difference < 1e-5
    assert receipt.notes == ("router.top_k is 4, it was 2",)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {i * 7919} of a text\n" for i in range(300)))
    return file


@pytest.fixture
def own(tmp_path, stored):
    """A folder of ours that reads bytes."""
    source = replace(stored(vocab_size=257), tokenizer=ByteTokenizer())
    write_model(source, tmp_path / "own")
    return tmp_path / "own"


def test_use_is_counted_on_the_text_and_the_loss_on_its_end(tmp_path, own, text):
    receipt = operate(Job(own, tmp_path / "out", str(text), tokens=2000), Prune(keep=5))
    source, result = open_model(own), open_model(tmp_path / "out")
    corpus = open_corpus(source, str(text), 2000)
    assert corpus.used_tokens == 1920 and receipt.corpus == (str(text), 1920)  # whole batches of four times 32 tokens
    for layer, groups in receipt.layers.items():
        used = receipt.usage[layer]
        assert sum(used) == pytest.approx(1.0, abs=1e-4)
        kept = [expert for (expert,) in groups]
        assert len(kept) == 5 and kept == sorted(kept)
        pruned = [used[e] for e in range(8) if e not in kept]
        assert max(pruned) <= max(used[e] for e in kept)
    assert receipt.measured.loss == (
        pytest.approx(plain_loss(source, text)),
        pytest.approx(plain_loss(result, text)),
    )
    assert loss_of(source, corpus) == pytest.approx(receipt.measured.loss[0])


def plain_loss(stored_model, text):
    """Mean loss of the whole module on the last twentieth of the bytes, in rows of 32."""
    ids = torch.tensor([*text.read_bytes(), 256])  # and the end of the document
    length = max(32, len(ids) // 20)
    start, model, total = len(ids) - length, stored_model.build(), 0.0
    rows = -(-length // 32) // 4 * 4  # whole batches of four
    starts = [start + 32 * (row * -(-length // 32) // rows) for row in range(rows)]
    targets = 0
    for at in starts:
        labels = ids[at : at + 32]
        before = ids[at - 1 : at] if at > start else torch.tensor([256])
        tokens = torch.cat([before, labels[:-1]])
        with torch.no_grad():
            logits = model(tokens[None])[0]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        targets += len(labels)
    return total / targets


def test_parts_of_the_text_do_not_overlap_and_hold_no_filling(own, text):
    corpus = open_corpus(open_model(own), str(text), 100_000)
    ids = [*text.read_bytes(), 256]  # and the end of the document
    rows = [tuple(ids[at : at + 32]) for at in range(0, len(ids), 32)]
    used = [tuple(row) for batch in corpus.used for row in batch.labels.tolist()]
    places = [rows.index(row) for row in used]
    assert places == sorted(set(places)) and len(places) > 0.9 * 0.95 * len(rows)
    assert corpus.used[0].tokens[0].tolist() == [256, *ids[:31]]  # text begins after the end of another document
    start = len(ids) - len(ids) // 20
    assert 32 * (places[-1] + 1) <= start
    ends = [tuple(ids[at : at + 32]) for at in range(start, len(ids), 32)]
    valid = [tuple(label for label in row if label != -100) for batch in corpus.valid for row in batch.labels.tolist()]
    assert set(valid) <= set(ends) and corpus.valid_targets == sum(map(len, valid)) > 200


@pytest.mark.parametrize("operation", [Merge(experts=3, by="outputs", align=True), Grow(9), Prune(keep=1)])
def test_every_operation_writes_a_folder_that_opens(tmp_path, own, text, operation):
    receipt = operate(Job(own, tmp_path / "out", str(text), tokens=256), operation)
    made = open_model(tmp_path / "out")
    assert made.plan().counts().total == receipt.after.parameters
    assert made.tokenizer is not None and receipt.measured.loss[1] > 0


def test_a_dry_run_says_the_sizes_and_writes_nothing(tmp_path, mixtral):
    receipt = operate(Job(mixtral[0], None), Grow(12))
    assert (receipt.before.experts, receipt.after.experts, receipt.after.experts_per_token) == (6, 12, 4)
    assert receipt.after.parameters > receipt.before.parameters and receipt.measured is None
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_done_is_refused_before_work(tmp_path, mixtral, own, text, stored):
    folder, _ = mixtral
    with pytest.raises(ConfigError, match="experts=4 is out of range, allowed: 7 or more"):
        operate(Job(folder, tmp_path / "out"), Grow(4))
    with pytest.raises(CheckpointError, match="has no tokenizer to read data="):
        operate(Job(folder, tmp_path / "out", str(text)), Prune(keep=2))
    with pytest.raises(DataError, match="nowhere.txt"):
        operate(Job(own, tmp_path / "out", str(tmp_path / "nowhere.txt")), Prune(keep=2))
    with pytest.raises(ConfigError, match="output=.* is not empty"):
        operate(Job(folder, own), Prune(experts=(1, 2)))
    write_model(stored(num_experts=0), tmp_path / "dense")
    with pytest.raises(ConfigError, match="is a dense model, allowed: a mixture of experts"):
        operate(Job(tmp_path / "dense", tmp_path / "out"), Prune(experts=(1, 2)))
    assert not (tmp_path / "out").exists() and not list(Path(tmp_path).glob(".out*"))
