"""`scatterfold sample`."""

import json
from dataclasses import replace

from scatterfold.moe.data.tokenizer import ByteTokenizer
from scatterfold.moe.interop import open_model, write_model
from scatterfold.tools.sample import stream


def test_text_is_the_same_for_the_same_seed(scatterfold, tmp_path, finished_run):
    words = [f"source={finished_run}", "prompt=word", "max_tokens=12", "temperature=1.0", "top_p=0.9"]
    first = scatterfold("sample", *words, "seed=3", "json=sample.json")
    assert first.code == 0 and not first.err
    assert first.out.startswith("word") and first.out.endswith("\n")
    assert scatterfold("sample", *words, "seed=3").out == first.out
    assert scatterfold("sample", *words, "seed=4").out != first.out
    figures = json.loads((tmp_path / "sample.json").read_text())
    assert f"word{figures['text']}\n" == first.out
    assert figures["tokens"] <= 12 and figures["step"] == 4


def test_a_checkpoint_is_a_source_and_greedy_is_the_default(scatterfold, finished_run):
    step = finished_run / "checkpoints" / "step-4"
    words = ["prompt=word", "max_tokens=5"]
    assert (
        scatterfold("sample", f"source={step}", *words).out
        == scatterfold("sample", f"source={finished_run}", *words).out
    )


def test_a_model_without_a_tokenizer_writes_no_text(scatterfold, tmp_path, finished_run):
    write_model(replace(open_model(finished_run), tokenizer=None), tmp_path / "out")
    outcome = scatterfold("sample", "source=out", "max_tokens=1")
    assert outcome.code == 2 and not outcome.out
    assert "source=out has no tokenizer, allowed: a folder with its tokenizer.json" in outcome.line


def test_what_is_wrong_is_one_line(scatterfold, tmp_path, finished_run):
    for words, expected in (
        (["source=nowhere"], "nowhere"),
        ([f"source={finished_run}", "max_tokens=-1"], "max_tokens=-1"),
        ([f"source={finished_run}", "top_p=2"], "top_p=2"),
        ([f"source={finished_run}", "temprature=1"], "did you mean temperature?"),
        (["prompt=a"], "source is missing"),
        ([f"source={finished_run}", "max_tokens=1", "json=no/such/folder/x.json"], "no/such/folder"),
    ):
        outcome = scatterfold("sample", *words)
        assert outcome.code == 2, words
        assert expected in outcome.line
    assert not list(tmp_path.iterdir())


def test_streaming_never_cuts_a_character_and_loses_no_byte():
    tokenizer = ByteTokenizer()
    text = "naïve café, 漢字, 👩‍🚀 and plain"
    pieces = list(stream(tokenizer.encode(text), tokenizer.decode))
    assert "".join(pieces) == text
    assert len(pieces) == len(text)
    broken = [*b"a", 0xE6, 0xBC, *b"b"]
    assert "".join(stream(broken, tokenizer.decode)) == tokenizer.decode(broken)
    endless = [0xFF] * 40
    assert "".join(stream(endless, tokenizer.decode)) == tokenizer.decode(endless)


def test_streaming_gives_a_tokenizer_its_context():
    def decode(ids):
        """Like SentencePiece: a space before each word but the first of a text."""
        return " ".join(f"w{i}" for i in ids)

    assert "".join(stream(range(7), decode)) == decode(range(7))
