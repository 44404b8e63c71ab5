"""`scatterfold experts`."""

import json

import pytest

from scatterfold.moe.interop import open_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "experts-cache"))


def test_pruned_merged_and_grown_models_have_receipts_and_sample(scatterfold, tmp_path, finished_run, corpus):
    data = [f"data={corpus}", "tokens=256"]
    jobs = {
        "prune": ["keep=2", *data],
        "merge": ["experts=2", *data],
        "grow": ["experts=8"],
    }
    for name, words in jobs.items():
        words = [f"source={finished_run}", f"output=out/{name}", f"json={name}.json", *words]
        outcome = scatterfold("experts", name, *words)
        assert outcome.code == 0, outcome.err
        receipt = json.loads((tmp_path / f"{name}.json").read_text())
        made = open_model(tmp_path / "out" / name)
        assert receipt["operation"] == name and receipt["after"]["parameters"] == made.plan().counts().total
        assert f"4 -> {made.plan().config.num_experts} per layer" in outcome.out
        assert "at most between logits" in outcome.out and ("loss" in outcome.out) == (name != "grow")
        assert scatterfold("sample", f"source=out/{name}", "prompt=word", "max_tokens=3").code == 0
    assert receipt["measured"]["largest_difference"] < 1e-4 and receipt["notes"] == ["router.top_k is 4, it was 2"]


def test_a_dry_run_needs_no_output(scatterfold, tmp_path, finished_run):
    outcome = scatterfold("experts", "grow", f"source={finished_run}", "experts=12", "dry_run=true")
    assert outcome.code == 0 and "4 -> 12 per layer" in outcome.out and "nothing, a dry run" in outcome.out
    assert not list(tmp_path.iterdir())


def test_help_and_an_unknown_operation(scatterfold):
    outcome = scatterfold("experts")
    assert outcome.code == 0 and all(name in outcome.out for name in ("prune", "merge", "grow"))
    assert "scatterfold experts merge source=" in scatterfold("experts", "merge", "--help").out
    assert "experts shrink is no command" in scatterfold("experts", "shrink").line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "output=out"], "keep is missing"),
        (["prune", "output=out", "keep=2"], "keep=2 goes by the use of the experts, allowed: data=CORPUS"),
        (["prune", "output=out", "experts=[0,4]"], "experts=[0, 4] names 4, allowed: 0 to 3"),
        (["merge", "output=out"], "experts is missing"),
        (["merge", "output=out", "experts=2", "by=taste"], "by=taste is unknown, allowed: router, weights, outputs"),
        (["grow", "experts=8"], "output is missing"),
        (["grow", "output=out", "experts=3"], "experts=3 is out of range"),
        (["grow", "output=out", "experts=8", "json=no/such/file"], "no/such is no folder"),
        (["grow", "output=out", "experts=8", "dtype=fp8"], "dtype=fp8 is unknown"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(scatterfold, tmp_path, finished_run, words, message):
    outcome = scatterfold("experts", words[0], f"source={finished_run}", *words[1:])
    assert outcome.code == 2 and message in outcome.line
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_none_is_one_line(scatterfold, tmp_path):
    outcome = scatterfold("experts", "prune", "source=nowhere", "output=out", "experts=[0,1]")
    assert outcome.code == 2 and "nowhere" in outcome.line and not list(tmp_path.iterdir())
