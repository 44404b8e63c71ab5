"""Tokenizers: text survives, and the bytes that tokens stand for are counted exactly."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from scatterfold.kernels import DataError
from scatterfold.moe.data import ByteTokenizer, HFTokenizer, open_tokenizer, tokenizer_from

TEXTS = ["the quick brown fox", "def f(x):\n    return x", "naïve café, 東京 🦊", "the fox returns the quick"] * 3


def byte_level(path, special=("<|endoftext|>",)):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))
    return path


def byte_fallback(path):
    """A vocabulary in the manner of SentencePiece: U+2581 for spaces, <0xNN> for characters it does not have."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581the", "qu", "\u2581fox"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {token: 259 + rank for rank, token in enumerate(letters)}
    merges = [("q", "u")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    byte_level(folder / "byte_level.json")
    byte_fallback(folder / "byte_fallback.json")
    return folder


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.to_bytes(np.array(ids, int)) == text.encode()
    assert tokenizer.encode_batch([text])[0].tolist() == ids
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode()) if ids else True


def test_bytes_ignore_separators_and_padding_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([256, 104, 105, 256, 300]) == "hi"
    assert tokenizer.to_bytes(np.array([256, 104, 105, 256])) == b"hi"
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.byte_lengths[256]) == (257, 256, 0)
    assert tokenizer.decode([0xE6, 0x9D]) == "\ufffd"  # half a character


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_token_bytes_are_the_text(folder, name, text):
    tokenizer = HFTokenizer(folder / f"{name}.json")
    ids = np.array(tokenizer.encode(text), dtype=np.int64)
    assert tokenizer.to_bytes(ids) == text.encode()
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.encode_batch([text, text])[1].tolist() == ids.tolist()


def test_a_separator_written_in_a_document_stays_text(folder):
    tokenizer = HFTokenizer(folder / "byte_level.json")
    ids = tokenizer.encode("before<|endoftext|>after")
    assert tokenizer.eod not in ids and tokenizer.decode(ids) == "before<|endoftext|>after"
    assert tokenizer.decode([tokenizer.eod, *ids, tokenizer.eod]) == "before<|endoftext|>after"


def test_word_pieces_count_the_space_before_a_word(tmp_path):
    vocabulary = {"[UNK]": 0, "[EOS]": 1, "play": 2, "##ing": 3, "now": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened = HFTokenizer(tmp_path)  # a folder that holds one
    assert opened.to_bytes(np.array(opened.encode("playing now"))) == b" playing now"
    assert opened.byte_lengths.tolist() == [6, 0, 5, 3, 4]


def test_the_separator_is_found_or_given(tmp_path, folder):
    assert HFTokenizer(folder / "byte_fallback.json").eod == 2  # </s>
    path = byte_level(tmp_path / "odd.json", special=["<stop>"])
    with pytest.raises(DataError, match=r"odd.json has none of the separators .*<\|endoftext\|>.*: set data.eod"):
        HFTokenizer(path)
    tokenizer = HFTokenizer(path, eod="<stop>")
    assert tokenizer.byte_lengths[tokenizer.eod] == 0
    with pytest.raises(DataError, match=r"data.eod='<halt>' is not in the vocabulary of .*odd.json"):
        HFTokenizer(path, eod="<halt>")
    with pytest.raises(DataError, match="data.eod='x' does not go with the byte tokenizer"):
        open_tokenizer("bytes", "x")


def test_a_description_builds_the_same_tokenizer(tmp_path, folder):
    assert isinstance(tokenizer_from(ByteTokenizer().spec()), ByteTokenizer)
    path = byte_level(tmp_path / "mine.json")
    tokenizer = HFTokenizer(path)
    spec = json.loads(json.dumps(tokenizer.spec()))
    assert tokenizer_from(spec).encode("the fox") == tokenizer.encode("the fox")
    run = tmp_path / "run"
    run.mkdir()
    tokenizer.save(run)
    path.unlink()
    assert tokenizer_from(spec, run).encode("the fox") == tokenizer.encode("the fox")
    with pytest.raises(DataError, match="mine.json: No such file"):
        tokenizer_from(spec)
    byte_fallback(run / "tokenizer.json").read_bytes()
    with pytest.raises(DataError, match=r"not in the vocabulary|has changed"):
        tokenizer_from(spec, run)
    with pytest.raises(DataError, match="kind='words' is unknown"):
        tokenizer_from({"kind": "words"})


def test_broken_files(tmp_path):
    with pytest.raises(DataError, match=r'tokenizer nowhere.json: No such file.*allowed: "bytes" or a tokenizer.json'):
        open_tokenizer("nowhere.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is not a Hugging Face tokenizer.json: ") as caught:
        open_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
