"""Tokenizers of a folder: ours there, theirs here."""

import json

import pytest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from dataclasses import replace  # noqa: E402

from scatterfold.kernels import CheckpointError  # noqa: E402
from scatterfold.moe.data.tokenizer import ByteTokenizer, HFTokenizer  # noqa: E402
from scatterfold.tests.moe.interop.huggingface.reference import make, opened, save, write  # noqa: E402

TEXTS = [
    "",
    "Hello, world!\n\n\tdef f(x):  return x ** 2 # ümläute, 漢字, 🙂\r\n",
    "".join(map(chr, range(300))),
    "  two spaces  and <|endoftext|> written out <s></s> [EOS]",
]


@pytest.fixture
def stored(tmp_path):
    return opened(save(make("llama", vocab_size=300, eos_token_id=7), tmp_path / "theirs"))


def bpe(folder, special, config=None):
    """A small byte-level BPE of theirs."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, hello you"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_the_byte_tokenizer_there_and_back(stored, tmp_path):
    ours = ByteTokenizer()
    folder = write(replace(stored, tokenizer=ours, origin={}), tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.eod
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.decode([72, 105, 256], skip_special_tokens=True) == "Hi"
    config = json.loads((folder / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (256, None)
    assert isinstance(opened(folder).tokenizer, ByteTokenizer)
    theirs.save_pretrained(folder)  # their spelling of the same
    assert isinstance(opened(folder).tokenizer, ByteTokenizer)


def test_a_tokenizer_of_a_run_there_and_back(stored, tmp_path):
    (tmp_path / "run").mkdir()
    bpe(tmp_path / "run", ["<|endoftext|>"])
    ours = HFTokenizer(tmp_path / "run")
    folder = write(replace(stored, tokenizer=ours), tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == ours.eod
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
    again = opened(folder).tokenizer
    assert again is not None and again.spec()["sha256"] == ours.spec()["sha256"]


def test_a_tokenizer_of_theirs_goes_along_as_it_is(stored, tmp_path):
    source = stored.source
    bpe(source, ["<unk>", "<fin>", "<|endoftext|>"], {"eos_token": {"content": "<fin>"}, "tokenizer_class": "X"})
    (source / "special_tokens_map.json").write_text('{"eos_token": "<fin>"}')
    opened_again = opened(source)
    assert opened_again.tokenizer is not None and opened_again.tokenizer.eod == 1
    back = write(opened_again, tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    "config, eos, end",
    [
        ({"eos_token": "<fin>"}, 0, 1),
        ({"eos_token": "absent"}, 0, 0),
        ({}, [1, 0], 1),
        (None, 1, 1),
        (None, None, 2),
        (None, 999, 2),
    ],
)
def test_the_end_of_a_sequence_is_what_the_files_say(config, eos, end, stored):
    bpe(stored.source, ["<unk>", "<fin>", "<|endoftext|>"], config)
    described = json.loads((stored.source / "config.json").read_text())
    (stored.source / "config.json").write_text(json.dumps({**described, "eos_token_id": eos}))
    tokenizer = opened(stored.source).tokenizer
    assert tokenizer is not None and tokenizer.eod == end


def test_a_tokenizer_without_an_end_is_no_tokenizer_and_a_damaged_one_is_refused(stored):
    described = json.loads((stored.source / "config.json").read_text())
    (stored.source / "config.json").write_text(json.dumps({**described, "eos_token_id": None}))
    bpe(stored.source, ["<unk>"])
    again = opened(stored.source)
    assert again.tokenizer is None and "tokenizer.json" in again.carried
    (stored.source / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read"):
        opened(stored.source)
