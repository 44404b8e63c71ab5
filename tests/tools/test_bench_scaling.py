"""`scatterfold bench scaling`: what it counts is what the formula says, and the same model is trained everywhere."""

import json

import pytest

from scatterfold.tools.bench.scaling.case import Model
from scatterfold.tools.bench.scaling.formula import expected, remote_ranks
from scatterfold.tools.cli import main

pytestmark = pytest.mark.usefixtures("warm")
SMALL = ["layers=2", "width=32", "heads=2", "experts=4", "expert_width=16", "vocabulary=64", "length=16", "sequences=4"]


@pytest.fixture(scope="module")
def records(warm, tmp_path_factory):
    file = tmp_path_factory.mktemp("scaling") / "scaling.json"
    layouts = "dp_replicate=1; dp_shard=2; ep=2; tp=2; cp=2; pp=2"
    words = ["bench", "scaling", "ranks=1,2", f"layouts={layouts}", "steps=1", f"json={file}", *SMALL]
    assert main(words) == 0
    return {record["layout"]: record for record in json.loads(file.read_text())["records"]}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "purpose"),
    [
        *(("dp_shard=2", "gradients"), ("ep=2", "gradients"), ("tp=2", "gradients"), ("pp=2", "gradients")),
        *(("tp=2", "tp"), ("cp=2", "cp"), ("pp=2", "pp")),
    ],
)
def test_bytes_are_those_of_the_formula(records, layout, purpose):
    record = records[layout]
    by_formula = record["formula_bytes"][purpose]
    # Sums of the vocabulary-parallel loss and of the gradient norm come on top; nothing may be missing.
    assert by_formula <= record["sent_bytes"][purpose] + 1e-6 <= by_formula * 1.02 + 2000


@pytest.mark.distributed
def test_tokens_sent_are_near_an_even_spread_and_nothing_is_left_unexplained(records):
    assert records["ep=2"]["sent_bytes"]["tokens"] == pytest.approx(records["ep=2"]["formula_bytes"]["tokens"], rel=0.4)
    for record in records.values():
        assert record["sent_bytes"]["other"] == 0
        unasked = [record["sent_bytes"][name] for name, count in record["formula_bytes"].items() if not count]
        assert max(unasked, default=0) <= 8  # the norm of all gradients


@pytest.mark.distributed
def test_every_layout_has_the_loss_of_one_process_and_its_share_of_the_state(records):
    alone = records["dp_replicate=1"]
    for record in records.values():
        assert record["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert record["step_ms"] > 0 and record["peak_bytes"] >= 0
    assert records["dp_shard=2"]["state_bytes"] == pytest.approx(alone["state_bytes"] / 2, rel=0.01)
    assert records["cp=2"]["state_bytes"] == alone["state_bytes"]


def test_formula_by_hand():
    """Two layers of width 4, two experts of width 3, vocabulary 8; 4 sequences of 4 tokens in one micro-batch."""
    from scatterfold.parallel import Layout

    model = Model(2, 4, 2, experts=2, top_k=1, expert_width=3, vocabulary=8, length=4, sequences=4, micro_batches=1)
    parameters = 2 * (4 * 16 + 2 * 4 + 2 * 4 + 2 * 3 * 4 * 3) + 2 * 8 * 4
    assert expected(model, Layout().resolve(2), 4)["gradients"] == 2 * 4 * parameters / 2
    folded = expected(model, Layout(ep=2).resolve(2), 4)
    assert folded["gradients"] == 2 * 4 * (parameters - 2 * 2 * 3 * 4 * 3) / 2  # experts are on one rank each
    assert remote_ranks(model, Layout(ep=2).resolve(2)) == 0.5
    assert folded["tokens"] == 4 * 2 * 8 * 4 * 4 * 0.5  # four ways, two layers, 8 tokens a rank, half of them travel
    assert expected(model, Layout(pp=2).resolve(2), 2)["pp"] == 2 * 16 * 4 * 2 / 2  # there and back, over two ranks


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["layouts=dp_shard=3"], "layout.dp_shard=3 does not divide"),
        (["layouts=zp=2"], "zp=2 is no size of a layout"),
        (["ranks=0"], "ranks=0 is too small"),
        (["sequences=3", "ranks=2"], "sequences=3 cannot be cut"),
        (["layouts=tp=2", "ranks=2", "heads=3"], "heads=3 does not divide by 2"),
        (["layouts=pp=2", "ranks=2", "layers=1"], "layers=1 are fewer than the stages"),
    ],
)
def test_bad_input_is_one_line(words, expected, capsys):
    assert main(["bench", "scaling", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
