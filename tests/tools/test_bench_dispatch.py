"""`scatterfold bench dispatch`: the bytes it states, by hand. No test looks at how long anything took."""

import json

import pytest
import torch

from scatterfold.tools.bench.dispatch.case import ROUTINGS, draw, remote_copies, remote_pairs
from scatterfold.tools.bench.dispatch.run import summary
from scatterfold.tools.bench.kernels.shapes import Shape
from scatterfold.tools.bench.ranks import measure_in_ranks
from scatterfold.tools.cli import main

pytestmark = pytest.mark.usefixtures("warm")
T, D, F, E, K = 24, 16, 8, 8, 3
SHAPE = Shape("small", T, D, F, E, K)


@pytest.mark.distributed
@pytest.mark.parametrize("words", [[], ["ranks=4", "etp=2", "chunks=2"], ["capacity_factor=0.5", "routings=hot_rank"]])
def test_bytes_are_the_bound_and_no_more(tmp_path, capsys, words):
    file = tmp_path / "dispatch.json"
    asked = ["ranks=2", "device=cpu", f"shapes={T},{D},{F},{E},{K}", "repeats=1", f"json={file}", *words]
    by_key = {word.split("=")[0]: word for word in asked}  # later words win
    assert main(["bench", "dispatch", *by_key.values()]) == 0
    found = json.loads(file.read_text())
    settings, ranks = found["settings"], found["conditions"]["ranks"]
    for record in found["records"]:
        figures = summary(record)
        if record["dispatcher"] == "all_gather":
            assert figures["rows_bytes"] == 2 * ranks * (ranks - 1) * T * D * 2
        elif settings["capacity_factor"] is None:
            assert figures["to_bound"] == 1.0
            assert figures["to_copies"] < 1.0
        else:
            limit = T * K // 2 // 2  # half of the fair share of two ranks: a buffer of this size travels, full or not
            assert figures["rows_bytes"] == 2 * ranks * limit * D * 2
            assert figures["dropped"] == ranks * (T - limit // K) * K  # all tokens want three experts of the first rank
    printed = capsys.readouterr().out
    assert printed.count("all_to_all") == printed.count("all_gather") == len(found["records"]) // 2


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("ep", "etp", "ep_index"), [(2, 1, 0), (4, 1, 3), (2, 2, 1)])
def test_pairs_and_copies_are_counted_as_sets(routing, ep, etp, ep_index):
    experts = draw(routing, SHAPE, ep, seed=1, rank=2)
    assert experts.shape == (T, K) and all(len(set(row)) == K for row in experts.tolist())
    own = (ep_index, 0)
    copies = [
        (t, (e // (E // ep), slice_))
        for t, row in enumerate(experts.tolist())
        for e in row
        for slice_ in range(etp)
        if (e // (E // ep), slice_) != own
    ]
    assert remote_copies(experts, E, ep, etp, ep_index) == len(copies)
    assert remote_pairs(experts, E, ep, etp, ep_index) == len(set(copies))


def test_a_hot_rank_gets_everything_it_can_take():
    experts = draw("hot_rank", SHAPE, 2, seed=0, rank=0)
    assert int(experts.max()) < E // 2
    experts = draw("hot_rank", SHAPE, 4, seed=0, rank=0)
    assert torch.equal((experts < E // 4).sum(1), torch.full((T,), E // 4))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("etp=3", "etp=3 does not divide ranks=4"),
        ("routings=zip", "routings=zip is unknown (did you mean zipf?)"),
        ("dispatchers=nccl", "dispatchers=nccl is unknown"),
        ("shapes=8,8,8,6,2", "model.num_experts=6 does not divide by layout.ep=4"),
        ("json=/nowhere/x.json", "cannot be written"),
        ("device=cuda", "torch finds 0 CUDA devices here"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(word, said, capsys):
    if word.startswith("device") and torch.cuda.device_count() > 0:
        pytest.skip("this machine has CUDA devices")
    assert main(["bench", "dispatch", "ranks=4", word]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1


def test_a_rank_that_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="^rank 0 stopped with exit code 1: .*No module named"):
        measure_in_ranks("scatterfold.no_such_module", {}, 1, timeout_s=60)


def test_ranks_that_hang_are_stopped(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="^ranks 0, 1 took too long$"):
        measure_in_ranks("sleeper", {}, 2, timeout_s=1.0)
