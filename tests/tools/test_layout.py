"""`scatterfold layout`."""

import json

import pytest


def test_ranks_and_groups(scatterfold, tmp_path):
    words = ["world=16", "dp_shard=2", "tp=2", "pp=2", "ep=4", "gpus_per_node=4", "json=layout.json"]
    outcome = scatterfold("layout", *words)
    assert outcome.code == 0 and not outcome.err
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert lines[1] == "attention pp 2 x dp_replicate 2 x dp_shard 2 x cp 1 x tp 2"
    assert lines[2] == "experts pp 2 x edp 2 x ep 4 x etp 1"
    assert "rank node pp dp_replicate dp_shard cp tp edp ep etp batch share" in lines
    assert "6 1 0 1 1 0 0 1 2 0 3" in lines
    found = json.loads((tmp_path / "layout.json").read_text())
    assert found["layout"]["world"] == 16 and found["layout"]["edp"] == 2
    assert found["ranks"][6]["ep"] == 2 and found["ranks"][6]["batch share"] == 3
    by_group = {entry["group"]: entry for entry in found["communication"]}
    assert by_group["dispatch"]["groups"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert by_group["dispatch"]["in a node"] == "all" and by_group["pp"]["in a node"] == "0 of 8"
    assert by_group["dp_cp"]["first group"] == [0, 2]


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        (["world=1"], set()),
        (["world=8"], {"stage", "world"}),
        (["world=8", "dp_shard=8"], {"dp_cp", "stage", "world"}),
        (["world=8", "ep=8"], {"dispatch", "stage", "world"}),
        (["world=8", "dp_shard=8", "ep=2"], {"dispatch", "dp_cp", "edp_shard", "stage", "world"}),
        (["world=8", "cp=2", "etp=2"], {"cp", "sequence", "dispatch", "stage", "edp_replicate", "etp", "world"}),
        (["world=8", "pp=8"], {"pp", "world"}),
    ],
)
def test_groups_that_communicate(scatterfold, tmp_path, words, groups):
    assert scatterfold("layout", *words, "json=layout.json").code == 0
    assert {entry["group"] for entry in json.loads((tmp_path / "layout.json").read_text())["communication"]} == groups


def test_long_lists_are_cut(scatterfold):
    out = scatterfold("layout", "world=512", "dp_shard=64", "ep=8", "rows=2").out
    assert "… 510 more ranks (rows=512 lists all)" in out
    assert len(out.splitlines()) < 30


def test_what_is_wrong_is_one_line(scatterfold):
    for words, expected in (
        (["world=6", "tp=4"], "layout.tp=4 does not divide the 6 ranks of this run, allowed: 1, 2, 3, 6"),
        (["world=8", "pp=2", "ep=8"], "layout.ep=8 does not divide the 4 ranks of a pipeline stage"),
        (["world=8", "tp=0"], "layout.tp=0 is too small"),
        (["tp=2"], "world is missing"),
        (["world=8", "dp_shart=2"], "did you mean dp_shard?"),
    ):
        outcome = scatterfold("layout", *words)
        assert outcome.code == 2, words
        assert expected in outcome.err and len(outcome.err.splitlines()) == 1
