"""`scatterfold bench upcycling`: equal FLOPs, runs that share what they have in common, and what is written."""

import json
import shutil
from functools import partial

import pytest
import torch

from scatterfold.moe.generate import generate
from scatterfold.moe.training.load import load_model
from scatterfold.tools.bench.upcycling import run as command
from scatterfold.tools.bench.upcycling.arms import COARSE, FINE
from scatterfold.tools.bench.upcycling.plan import steps_within
from scatterfold.tools.bench.upcycling.results import crossing, curve_crossing, gains, summarise
from scatterfold.tools.bench.upcycling.speed import rows_of, write
from scatterfold.tools.cli import main

CHANGES = (
    "model.layers=1,model.width=16,model.heads=2,model.kv_heads=1,model.ffn_width=16,model.max_positions=128,"
    "data.sequence_length=32,data.global_batch_size=4,data.prefetch=0,schedule.warmup_steps=2,trainer.eval_every=2,"
    "trainer.eval_batches=2,trainer.checkpoint_every=2,trainer.device=cpu"
)
STEPS = 8


@pytest.fixture(scope="module")
def bench(corpus):
    """`bench(output, …) -> exit code` of the command on a toy."""

    def run(output, *words, changes="", steps=STEPS, seeds="[3]"):
        every = f"{CHANGES},data.cache_dir={corpus.parent / 'cache'}{changes}"
        given = [f"output={output}", f"data={corpus}", f"steps={steps}", f"seeds={seeds}", f"changes=[{every}]"]
        return main(["bench", "upcycling", *given, *words])

    return run


@pytest.fixture(scope="module")
def whole(bench, tmp_path_factory):
    """The folder of one whole comparison; do not change it."""
    output = tmp_path_factory.mktemp("upcycling") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "measure", partial(command.measure, rounds=1))
        assert bench(output, "extra=1") == 0
    return output


@pytest.fixture(scope="module")
def figures(whole):
    return json.loads((whole / "upcycling.json").read_text())


def test_every_file_is_written(whole):
    assert (whole / "upcycling.png").read_bytes().startswith(b"\x89PNG")
    page = (whole / "README.md").read_text()
    for words in ("dense, continued", "upcycled: 8 experts", "from scratch", "writing, batch 16"):
        assert words in page
    assert "±" not in page  # one seed has no spread
    names = {path.name for path in (whole / "seed-3").iterdir()}
    assert names == {"base", "dense", "sparse", "fine_grained", "scratch"}


def test_flops_by_hand(figures):
    """Width 16, two heads of 8 on one key-value head, MLPs of 16, 258 bytes and marks; 32 tokens in a sequence."""
    vocabulary = json.loads(json.dumps(figures["models"]["dense"]["parameters"])) - (16 * (2 * 16 + 2 * 8) + 2 * 8)
    vocabulary = (vocabulary - 3 * 16 * 16 - 3 * 16) // (2 * 16)
    assert 256 <= vocabulary <= 260  # bytes, and the marks of the tokenizer
    rest = 16 * (2 * 16 + 2 * 8) + 2 * 8 + 2 * 16 + 16 + vocabulary * 16  # attention, norms, head; no embedding
    attention = 12 * 2 * 8 * (32 + 1) / 2
    by_hand = {
        "dense": 6 * (rest + 3 * 16 * 16) + attention,
        "sparse": 6 * (rest + 8 * 16 + 2 * 3 * 16 * 16) + attention,
        "fine_grained": 6 * (rest + 16 * 16 + 2 * 3 * 16 * 8) + attention,
        "scratch": 6 * (rest + 8 * 16 + 2 * 3 * 16 * 16) + attention,
    }
    for arm, flops in by_hand.items():
        assert figures["models"][arm]["flops_per_token"] == flops
        assert figures["models"][arm]["steps"][0] == int(STEPS * by_hand["dense"] / flops)
    assert figures["models"]["scratch"]["steps"][1] == int(2 * STEPS * by_hand["dense"] / by_hand["scratch"])
    assert figures["models"]["fine_grained"]["active"] - figures["models"]["dense"]["active"] == 16 * 16  # its router


def test_no_run_spends_more_than_its_budget_nor_a_step_less(figures):
    dense = figures["settings"]["flops_of_dense_training"]
    for run in figures["runs"]:
        assert run["flops"] <= run["budget"] * dense * (1 + 1e-9)
        assert run["flops"] + run["flops"] / run["steps"] > run["budget"] * dense


def test_an_exact_budget_is_not_rounded_down():
    assert [steps_within(budget * 1000 * 0.7, 0.7) for budget in (0.1, 0.3, 0.7, 1.1)] == [100, 300, 700, 1100]


def test_upcycled_arms_begin_where_the_dense_model_ended(whole):
    """Step 0 of both, by the logits; the arms' training starts from these weights."""
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        dense = load_model(whole / "seed-3" / "base").model
        wanted = dense.logits(dense.hidden(tokens))
        for arm in ("sparse", "fine_grained"):
            upcycled = load_model(whole / "seed-3" / arm / "start").model
            torch.testing.assert_close(upcycled.logits(upcycled.hidden(tokens)), wanted, rtol=1e-5, atol=1e-5)
            config = (whole / "seed-3" / arm / "extra-1" / "config.yaml").read_text()
            assert f"init_from: {whole / 'seed-3' / arm / 'start'}" in config


def test_a_finished_comparison_trains_nothing_and_keeps_the_prose(bench, whole, tmp_path, capsys):
    copy = shutil.copytree(whole, tmp_path / "copy")
    page = copy / "README.md"
    page.write_text("# Mine\n\nBefore.\n\n" + page.read_text().partition("\n")[2] + "\nAfter.\n")
    shutil.rmtree(copy / "seed-3" / "dense")
    before = json.loads((copy / "upcycling.json").read_text())
    assert bench(copy, "extra=1") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "steps" in line]
    assert len(said) == 1 and "dense/extra-1, 8 steps" in said[0]
    assert json.loads((copy / "upcycling.json").read_text())["results"] == before["results"]
    assert page.read_text().startswith("# Mine\n\nBefore.\n") and page.read_text().endswith("\nAfter.\n")
    assert page.read_text().count("| dense, continued |") == 3  # one table each, not six


def test_a_run_that_goes_on_from_a_longer_one_is_the_run_alone(bench, whole, figures, tmp_path):
    """Six steps with two of warm-up and one that decays: all but the end are those of the run of eight."""
    assert bench(tmp_path / "alone", "extra=0.75", "arms=dense", "speed=false") == 0
    longer = shutil.copytree(whole, tmp_path / "both")
    assert bench(longer, "extra=[0.75,1]", "arms=dense", "speed=false") == 0
    config = (longer / "seed-3" / "dense" / "extra-0.75" / "config.yaml").read_text()
    assert "extra-1/checkpoints/step-4" in config
    ends = [
        json.loads((folder / "upcycling.json").read_text())["results"]["arms"]["dense"]["bits_per_byte"]["0.75"]["mean"]
        for folder in (tmp_path / "alone", longer)
    ]
    assert ends[0] == ends[1]
    assert ends[0] not in figures["results"]["arms"]["dense"]["bits_per_byte"]["1"]["seeds"]


def test_other_settings_are_refused_before_any_work(bench, whole, capsys):
    assert bench(whole, "extra=1", changes=",optimizer.lr=0.5") == 2
    assert "seed-3/base holds a run with optimizer.lr=0.003, not 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["arms=[dense,moe]"], "arms=moe is unknown, allowed: dense, sparse"),
        (["arms=[dense,dense]"], "names one twice"),
        (["extra=0"], "extra=0 is no budget"),
        (["extra=0.01"], "extra=0.01 leaves no step to dense, allowed: 0.12 or more"),
        (["data=nowhere"], "data=nowhere is not there"),
        (["steps=0"], "steps=0 is too small"),
        (["changes=[seed=1]"], "changes=seed=1 is set for each run"),
        (["changes=[model.ffn_width=15]"], "model.ffn_width=15 cannot be cut in 2 experts"),
        (["changes=[model.widht=16]"], "model.widht=16 is an unknown key (did you mean model.width?)"),
    ],
)
def test_bad_input_is_one_line_before_any_work(words, expected, scatterfold, tmp_path):
    given = [] if words[0].startswith("steps") else ["steps=8"]
    outcome = scatterfold("bench", "upcycling", "output=out", *given, *words)
    assert outcome.code == 2 and expected in outcome.line
    assert not (tmp_path / "out").exists()


def test_experts_cost_what_they_should():
    assert FINE.changes(256) == {
        "model.num_experts": 16,
        "model.expert_width": 128,
        "router.top_k": 2,
        "router.renormalise": True,
    }
    assert COARSE.number == 8 and COARSE.changes(256)["model.expert_width"] == 256


def test_gains_are_paired_by_seed_and_the_crossing_is_where_they_stay_positive():
    def entry(arm, seed, budget, bits):
        curve = [(0.5 * budget, bits + 0.1), (budget, bits)]
        return {
            **{"arm": arm, "seed": seed, "budget": budget, "total": False, "bits_per_byte": bits},
            **{"curve": curve, "stable_until": budget},
        }

    dense = [entry("dense", 0, 1.0, 2.0), entry("dense", 1, 1.0, 3.0), entry("dense", 0, 2.0, 1.5)]
    dense.append(entry("dense", 1, 2.0, 2.5))
    sparse = [entry("sparse", 1, 1.0, 3.2), entry("sparse", 0, 1.0, 2.2), entry("sparse", 0, 2.0, 1.3)]
    sparse.append(entry("sparse", 1, 2.0, 1.9))
    found = gains([*dense, *sparse], "sparse")
    assert found[1.0].values == pytest.approx((-0.2, -0.2)) and found[1.0].std == pytest.approx(0, abs=1e-12)
    assert found[2.0].mean == pytest.approx(0.4) and found[2.0].std == pytest.approx(0.08**0.5)
    summary = summarise([*dense, *sparse], ("dense", "sparse"))["arms"]["sparse"]
    assert summary["pays_from"] == pytest.approx(1 + 0.2 / 0.6)
    assert curve_crossing([*dense, *sparse], "sparse") == pytest.approx(1.0)  # the mean curve lies below at all x


def test_crossing_by_hand():
    assert crossing([1, 2, 3], [-1, 1, 2]) == 1.5
    assert crossing([1, 2, 3], [1, -1, 3]) == 2.25  # it must stay above
    assert crossing([1, 2], [0.5, 1]) == 1
    assert crossing([1, 2], [1, -0.1]) is None


def test_rows_that_are_timed_are_written_as_sampling_writes_them(finished_run):
    model = load_model(finished_run).model
    prompt = rows_of(list(range(50)), batch=3, length=5)
    assert prompt[2].tolist() == [10, 11, 12, 13, 14]
    with torch.inference_mode():
        written, _, _ = write(model, prompt, 6)
    # The first token after the prompt is not timed and not returned.
    expected = [list(generate(model, row.tolist(), 7))[1:] for row in prompt]
    assert written.tolist() == expected
