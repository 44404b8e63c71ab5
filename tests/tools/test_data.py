"""`scatterfold data prepare`."""

import json


def test_text_becomes_a_dataset_that_training_reads(scatterfold, tmp_path, tiny, corpus):
    outcome = scatterfold("data", "prepare", f"source={corpus}", "output=data/text", "workers=1", "json=receipt.json")
    assert outcome.code == 0 and not outcome.err
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["documents"] == 20
    assert f"{receipt['tokens']:,}" in outcome.out
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"text.bin", "text.idx", "text.json"}
    again = scatterfold("data", "prepare", f"source={corpus}", "output=data/text", "workers=1")
    assert again.code == 0 and again.out == outcome.out
    run = ["data.path=data/text", "trainer.steps=1", "trainer.checkpoint_every=0", "run_dir=run", "logger.display=none"]
    assert scatterfold("train", *tiny, *run).code == 0


def test_several_sources(scatterfold, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    outcome = scatterfold("data", "prepare", "source=[a.txt,b.txt]", "output=both", "workers=1")
    assert outcome.code == 0
    assert json.loads((tmp_path / "both.json").read_text())["documents"] == 2


def test_what_is_wrong_is_one_line_and_leaves_nothing(scatterfold, tmp_path, corpus):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (tmp_path / "a_file").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    for words, expected in (
        (["source=nowhere", "output=x"], "nowhere"),
        (["source=empty", "output=x"], "empty"),
        (["source=bad.jsonl", "output=x", "workers=1"], "bad.jsonl"),
        (["source=a_file", "output=a_file/x", "workers=1"], "a_file"),
        (["source=a_file", "output=x", "tokenizer=nope.json"], "nope.json"),
        (["source=a_file", "output=x", "workers=0"], "workers=0"),
        (["source=a_file", "output=x", "textkey=body"], "did you mean text_key?"),
        (["source=a_file"], "output is missing"),
    ):
        outcome = scatterfold("data", "prepare", *words)
        assert outcome.code == 2, words
        assert expected in outcome.line
        assert sorted(tmp_path.rglob("*")) == before, words
