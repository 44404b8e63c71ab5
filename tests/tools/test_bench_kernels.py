"""`scatterfold bench kernels`: what it measures, marks and writes. No test looks at how long anything took."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scatterfold.kernels import choose_backend
from scatterfold.tools.bench.kernels import run as bench_run
from scatterfold.tools.bench.kernels.case import Layer, Refused, draw_experts, leaf, make_case
from scatterfold.tools.bench.kernels.check import reference
from scatterfold.tools.bench.kernels.clock import LEAST, MOST, call, time_interleaved
from scatterfold.tools.bench.kernels.entries import Entry, all_entries, dense, gpu_peers, ours, pipeline
from scatterfold.tools.bench.kernels.memory import SavedBytes, peak_bytes
from scatterfold.tools.bench.kernels.shapes import CPU_SHAPES, GPU_SHAPES, Shape, parse_shapes
from scatterfold.tools.cli import main

CPU = torch.device("cpu")
T, D, F, E, K = 32, 32, 16, 4, 2
SHAPE = Shape("small", T, D, F, E, K)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """The output folder of a tiny run with everything that is installed."""
    folder = tmp_path_factory.mktemp("bench") / "deeper" / "output"
    assert main(["bench", "kernels", f"shapes={T},{D},{F},{E},{K}", "threads=1", "seconds=0", f"output={folder}"]) == 0
    return folder


@pytest.fixture
def case():
    return make_case(SHAPE, torch.float32, CPU, "uniform", seed=1)


def cases_of(folder: Path) -> list[dict]:
    return [case for run in json.loads((folder / "kernels.json").read_text())["runs"] for case in run["cases"]]


def entries_of(case: dict) -> dict[str, dict]:
    return {entry["name"]: entry for entry in case["entries"]}


# What a run measures


def default(dtype):
    """What this processor runs: C++ kernels or torch's."""
    return choose_backend(CPU, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], D, F).backend


def test_every_case_has_ours_the_limits_and_the_peers(measured):
    cases = cases_of(measured)
    assert [(case["dtype"], case["direction"]) for case in cases] == [
        (dtype, direction) for dtype in ("fp32", "bf16") for direction in ("forward", "forward+backward")
    ]
    for case in cases:
        status = {name: entry["status"] for name, entry in entries_of(case).items()}
        assert {"cpu", "torch", "reference", "dense_a", "dense_b", "pipeline"} <= set(status)
        for name in ("cpu", "torch", "reference", "dense_a", "dense_b", "pipeline"):
            assert status[name] == "ok", (name, entries_of(case)[name]["note"])
        assert case["default"] == default(case["dtype"]) and case["shape"]["tokens"] == T


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("transformers", ["transformers_eager", "transformers_batched_mm", "transformers_grouped_mm"]),
        ("deepspeed", ["deepspeed"]),
    ],
)
def test_peers_that_run_on_a_cpu_compute_what_we_compute(measured, package, names):
    pytest.importorskip(package)
    for case in cases_of(measured):
        for name in names:
            entry = entries_of(case)[name]
            assert entry["status"] == "ok", entry["note"]
            assert entry["error"] < (1e-5 if case["dtype"] == "fp32" else 2e-2)


def test_figures_are_positive_and_follow_from_the_times(measured):
    for case in cases_of(measured):
        entries = entries_of(case)
        factor = 18 if case["direction"] == "forward+backward" else 6
        for name, entry in entries.items():
            if entry["status"] != "ok":
                assert entry["median_ms"] is None and entry["to_ours"] is None, name
                continue
            assert len(entry["samples"]) >= LEAST and min(entry["samples"]) > 0
            assert entry["q1_ms"] <= entry["median_ms"] <= entry["q3_ms"]
            assert entry["median_ms"] == pytest.approx(sorted(entry["samples"])[len(entry["samples"]) // 2], rel=1e-3)
            assert entry["to_ours"] == pytest.approx(entry["median_ms"] / entries[case["default"]]["median_ms"])
            assert entry["to_dense_a"] == pytest.approx(entry["median_ms"] / entries["dense_a"]["median_ms"])
            assert entry["to_dense_b"] == pytest.approx(entry["median_ms"] / entries["dense_b"]["median_ms"])
            assert entry["tflops"] == pytest.approx(factor * T * K * D * F / entry["median_ms"] / 1e9)
            assert entry["share_of_peak"] == pytest.approx(entry["tflops"] / case["peak_tflops"])
            assert entry["peak_bytes"] > 0
            assert (entry["saved_bytes"] is None) == (case["direction"] == "forward")


def test_saved_bytes_of_ours_equal_the_formula(measured):
    for case in cases_of(measured):
        if case["direction"] == "forward":
            continue
        size = 4 if case["dtype"] == "fp32" else 2
        N = T * K
        tables = 4 * N + 4 * N + 4 * N + 4 * (E + 1) + 4 * (T + 1)  # token, weight, assignment, and both offsets
        expected = size * (T * D + N * 2 * F) + tables + 8 * N  # and the order of the sort
        assert case["saved_formula"] == expected
        for name in ("cpu", "torch"):
            assert entries_of(case)[name]["saved_bytes"] == expected
        assert entries_of(case)["pipeline"]["saved_bytes"] > expected


def test_conditions_and_command_are_kept(measured):
    (run,) = json.loads((measured / "kernels.json").read_text())["runs"]
    assert run["commands"] == ["scatterfold bench kernels shapes=32,32,16,4,2 threads=1 seconds=0"]
    conditions = run["conditions"]
    assert conditions["threads"] == 1 and conditions["routing"] == "balanced" and conditions["seed"] == 0
    assert conditions["versions"]["torch"] == torch.__version__ and conditions["device"]


def test_table_plot_and_page_of_a_run(measured):
    text = (measured / "kernels.md").read_text()
    assert text.count("| entry | ms |") == 4
    for part in ("ours: cpu", "dense (a)", "gather + F.grouped_mm", "of peak", "saved by the formula"):
        assert part in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, "columns do not line up"
    assert (measured / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_the_terminal_shows_the_same_table(scatterfold):
    words = [f"shapes={T},{D},{F},{E},{K}", "dtypes=fp32", "entries=torch,liger", "seconds=0"]
    outcome = scatterfold("bench", "kernels", *words, "json=out.json")
    assert outcome.code == 0
    assert outcome.err.splitlines() == ["measuring t32d32f16e4k2 fp32"]
    rows = [line.split("  ")[0] for line in outcome.out.splitlines()]
    for name in (f"ours: {default('fp32')}", "ours: torch", "dense (a)", "dense (b)"):
        assert rows.count(name) == 2
    assert "gather + F.grouped_mm" not in rows  # not asked for
    assert set(entries_of(cases_of_file("out.json")[0])) == {
        *(default("fp32"), "torch", "dense_a", "dense_b", "liger"),
    }


def cases_of_file(path: str) -> list[dict]:
    return json.loads(Path(path).read_text())["runs"][0]["cases"]


# Wrong and failing entries


def fake(name: str, change) -> Entry:
    """A peer that computes what our layer computes, but for what `change(layer, case)` does to it."""
    return Entry(name, "peer", lambda case: change(ours.build("reference", case), case))


def scaled(layer: Layer, case) -> Layer:
    return Layer(lambda: 1.01 * layer.forward(), layer.x, layer.grad, layer.parameters, layer.weights)


def wrong_gradient(layer: Layer, case) -> Layer:
    def forward():
        out = layer.forward()
        return out.detach() + 2 * (out - out.detach())

    return Layer(forward, layer.x, layer.grad, layer.parameters, layer.weights)


def no_weight_gradient(layer: Layer, case) -> Layer:
    extra = leaf(torch.zeros(3))
    return Layer(layer.forward, layer.x, layer.grad, (*layer.parameters, extra), layer.weights)


def first_expert_only(layer: Layer, case) -> Layer:
    first = make_case(SHAPE, case.dtype, CPU, "uniform", seed=1)
    object.__setattr__(first, "weights", case.weights * torch.tensor([1.0, 0.0]))
    return ours.build("cpu", first)


def not_finite(layer: Layer, case) -> Layer:
    return Layer(lambda: layer.forward() * torch.nan, layer.x, layer.grad, layer.parameters, layer.weights)


def fails_in_forward(layer: Layer, case) -> Layer:
    def forward():
        raise RuntimeError("first line\nsecond line")

    return Layer(forward, layer.x, layer.grad, layer.parameters, layer.weights)


def refuses(layer: Layer, case) -> Layer:
    raise Refused("has no fp32")


def fails_later(layer: Layer, case) -> Layer:
    calls = iter(range(4))  # checked, memory twice, one timed call

    def forward():
        if next(calls, None) is None:
            raise RuntimeError("the fifth call")
        return layer.forward()

    return Layer(forward, layer.x, layer.grad, layer.parameters, layer.weights)


@pytest.mark.parametrize(
    ("change", "status", "note"),
    [
        (scaled, "wrong", "computes something else: relative error"),
        (wrong_gradient, "wrong", "computes something else: relative error"),
        (first_expert_only, "wrong", "computes something else: relative error"),
        (not_finite, "wrong", "computes something else: relative error inf"),
        (no_weight_gradient, "wrong", "computes no gradient for some of its weights"),
        (fails_in_forward, "failed", "RuntimeError: first line"),
        (fails_later, "failed", "RuntimeError: the fifth call"),
        (refuses, "refused", "has no fp32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_peer_that_is_wrong_or_fails_is_marked_and_the_run_goes_on(scatterfold, monkeypatch, change, status, note):
    sound = [entry for entry in all_entries() if entry.name in ("dense_a", "dense_b", "pipeline")]
    monkeypatch.setattr(bench_run, "chosen_entries", lambda names: [fake("strange", change), *sound])
    monkeypatch.setattr(bench_run, "measure_peak", lambda device, dtype: 1.0)
    words = [f"shapes={T},{D},{F},{E},{K}", "dtypes=fp32", "seconds=0", "routing=uniform", "seed=1"]
    outcome = scatterfold("bench", "kernels", *words, "json=out.json", "output=out")
    assert outcome.code == 0
    line = next(line for line in outcome.out.splitlines() if line.startswith("strange"))
    assert f"{status}: {note}" in line
    for case in cases_of_file("out.json"):
        strange = entries_of(case)["strange"]
        assert strange["status"] == status and strange["note"].startswith(note)
        assert strange["to_ours"] is None and strange["to_dense_b"] is None
        assert entries_of(case)["pipeline"]["status"] == "ok" and entries_of(case)["pipeline"]["to_ours"] > 0


def test_a_package_that_is_missing_is_named_below_the_table(scatterfold, monkeypatch):
    sound = [entry for entry in all_entries() if entry.kind == "limit"]
    missing = Entry("liger", "peer", gpu_peers.build_liger, "no_such_package")
    monkeypatch.setattr(bench_run, "chosen_entries", lambda names: [missing, *sound])
    monkeypatch.setattr(bench_run, "measure_peak", lambda device, dtype: 1.0)
    outcome = scatterfold("bench", "kernels", f"shapes={T},{D},{F},{E},{K}", "dtypes=fp32", "seconds=0")
    assert outcome.code == 0
    assert "not installed: Liger-Kernel" in outcome.out
    assert not [line for line in outcome.out.splitlines() if line.startswith("Liger-Kernel")]


@pytest.mark.parametrize(
    "build",
    [gpu_peers.build_scattermoe, gpu_peers.build_sonicmoe, gpu_peers.build_megablocks, gpu_peers.build_liger],
    ids=lambda build: build.__name__,
)
def test_gpu_peers_refuse_a_cpu_in_one_line(build, case):
    with pytest.raises(Refused, match="^needs an NVIDIA GPU, this is cpu$"):
        build(case)


def test_batched_mm_refuses_what_does_not_fit():
    pytest.importorskip("transformers")
    entry = next(entry for entry in all_entries() if entry.name == "transformers_batched_mm")
    large = make_case(Shape("large", 4096, 512, 1024, 8, 2), torch.bfloat16, CPU, "balanced", 0)
    with pytest.raises(Refused, match="would copy 24 GiB of weights"):
        entry.build(large)


# The parts


def test_the_reference_is_what_the_layer_computes(case):
    right = reference(case)
    expected = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for e, w in zip(case.experts[t].tolist(), case.weights[t].tolist()):
            h = case.w_in[e].double() @ case.x[t].double()
            a = torch.nn.functional.silu(h[:F]) * h[F:]
            expected[t] += w * (case.w_out[e].double() @ a)
    torch.testing.assert_close(right.out, expected[right.rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", [dense.build_a, dense.build_b, pipeline.build], ids=["a", "b", "pipeline"])
def test_flops_are_those_that_are_counted(build, case):
    layer = build(case)
    if build is pipeline.build:
        layer = ours.build(
            "reference", case
        )  # the counter does not know grouped_mm; the same layer with plain products
    for with_backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            call(layer, with_backward)
        assert counter.get_total_flops() == SHAPE.flops(with_backward)


def test_peak_memory_sees_temporaries_inside_operators():
    @torch.library.custom_op("bench_test::temporary", mutates_args=())
    def temporary(x: torch.Tensor) -> torch.Tensor:
        first = x.new_empty(250_000)
        del first
        second, third = x.new_empty(100_000), x.new_empty(50_000)
        return second[:10] + third[:10]

    x = torch.zeros(10)
    before = torch.zeros(1000)

    def measured_before():
        nonlocal earlier
        earlier = torch.empty(1000)

    def run():
        nonlocal before, earlier
        before = earlier = None  # released, but not allocated, within: does not count
        return temporary(x)

    earlier = None
    assert peak_bytes(measured_before, CPU) == 4000
    assert peak_bytes(run, CPU) == 4 * 250_000
    assert peak_bytes(lambda: torch.empty(1000), CPU) == 4000
    sizes = iter((3000, 1000, 2000))
    assert peak_bytes(lambda: torch.empty(next(sizes)), CPU, times=3) == 4000


def test_saved_bytes_count_each_memory_once_and_no_weights():
    x, w = leaf(torch.randn(8, 4)), leaf(torch.randn(4, 6))
    layer = Layer(lambda: x @ w, x, torch.ones(8, 6), (w,))
    saved = SavedBytes(layer)
    with saved.counting():
        y = layer.forward()
        (y * y).sum()
    assert saved.total == 4 * 8 * 4 + 4 * 8 * 6


def test_interleaving_is_fair_and_ends():
    cost = {"fast": 1.0, "slow": 10.0, "hopeless": 1000.0}
    order = []

    def calls(name):
        def once():
            order.append(name)
            if name == "broken" and order.count("broken") == 2:
                raise RuntimeError("no more")
            return cost.get(name, 1.0)

        return once

    samples, errors = time_interleaved({name: calls(name) for name in (*cost, "broken")}, seconds=0.4)
    assert len(samples["hopeless"]) == LEAST  # and no more: one call already takes more than its share
    assert len(samples["slow"]) == 10 and len(samples["fast"]) == 100
    assert len(samples["broken"]) == 1 and str(errors["broken"]) == "no more"
    places = [place for place, name in enumerate(order) if name == "slow"]
    assert all("fast" in order[a:b] for a, b in zip(places[1:], places[2:]))  # they take turns
    many, _ = time_interleaved({"fast": calls("fast")}, seconds=10)
    assert len(many["fast"]) == MOST
    nothing, _ = time_interleaved({"fast": calls("fast")}, seconds=0)
    assert len(nothing["fast"]) == LEAST


def test_routing():
    generator = torch.Generator().manual_seed(0)
    counts = {}
    for routing in ("balanced", "uniform", "zipf"):
        experts = draw_experts(routing, 300, 16, 3, generator)
        assert experts.shape == (300, 3)
        assert all(len(set(row)) == 3 for row in experts.tolist())
        counts[routing] = torch.bincount(experts.flatten(), minlength=16)
    assert counts["balanced"].max() - counts["balanced"].min() <= 1
    assert 1 < counts["uniform"].max() - counts["uniform"].min() < 60
    assert counts["zipf"].max() > 4 * counts["zipf"].float().mean()


def test_shapes_by_name_and_number():
    assert parse_shapes("", "cpu") == list(CPU_SHAPES) and parse_shapes("", "cuda") == list(GPU_SHAPES)
    assert parse_shapes("OLMoE,7b_fine", "cpu") == [GPU_SHAPES[5], GPU_SHAPES[1]]
    assert parse_shapes("e8k2f1024; 1,2,3,4,4", "cpu")[1] == Shape("t1d2f3e4k4", 1, 2, 3, 4, 4)


# Bad input


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["shapes=olmo"], ["shapes=olmo is unknown (did you mean olmoe?)", "e8k2f1024", "T,D,F,E,K"]),
        (["shapes=1,2,3"], ["shapes=1,2,3 is no shape", "five whole numbers"]),
        (["shapes=32,32,x,4,2"], ["shapes=32,32,x,4,2 is no shape"]),
        (["shapes=0,32,16,4,2"], ["a number below 1"]),
        (["shapes=32,32,16,4,5"], ["K=5 is larger than E=4"]),
        (["shapes=;"], ["names no shape"]),
        (["dtypes=fp64"], ["dtypes=fp64 is unknown", "fp32, bf16, fp16"]),
        (["entries=transfomers_eager"], ["entries=transfomers_eager", "did you mean transformers_eager?"]),
        (["device=tpu"], ["device=tpu", "auto, cpu, cuda"]),
        (["routing=skewed"], ["routing=skewed", "balanced, uniform, zipf"]),
        (["threads=0"], ["threads=0", "1 or more"]),
        (["seconds=-1"], ["seconds=-1"]),
        (["json=nowhere/out.json"], ["nowhere/out.json"]),
        (["output=/proc/out"], ["output=/proc/out"]),
        (["quick"], ["'quick' is not an argument"]),
        (["report"], ["source is missing"]),
        (["report", "source=none.json", "output=out"], ["source=none.json cannot be read"]),
        (["report", "source=text.json", "output=out"], ["source=text.json holds no kernel figures"]),
        (["report", "source=other.json", "output=out"], ["source=other.json holds no kernel figures"]),
        (["report", "source=empty.json", "output=out"], ["no measured case"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input_is_one_line(scatterfold, tmp_path, words, expected):
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "other.json").write_text('{"format": "something else"}')
    (tmp_path / "empty.json").write_text('{"format": "scatterfold bench kernels 1", "runs": []}')
    before = set(tmp_path.iterdir())
    outcome = scatterfold("bench", "kernels", *words)
    assert outcome.code == 2
    for part in expected:
        assert part in outcome.line
    assert set(tmp_path.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_gpu_that_is_not_here(scatterfold):
    outcome = scatterfold("bench", "kernels", "device=cuda")
    assert outcome.code == 2 and "device=cuda is not here, allowed: cpu" in outcome.line


# Reports of earlier runs


def test_a_report_reads_what_a_run_wrote(scatterfold, tmp_path, measured):
    outcome = scatterfold("bench", "kernels", "report", f"source={measured / 'kernels.json'}", "output=again")
    assert outcome.code == 0 and not outcome.err
    for name in ("kernels.json", "kernels.md"):
        assert (tmp_path / "again" / name).read_text() == (measured / name).read_text()
    assert (tmp_path / "again" / "kernels.png").stat().st_size > 5000


def test_reports_merge_runs(scatterfold, tmp_path, measured):
    """A second run with another entry, one entry measured again, and a third under other conditions."""
    record = json.loads((measured / "kernels.json").read_text())
    second = json.loads(json.dumps(record))
    second["runs"][0]["commands"] = ["scatterfold bench kernels again"]
    for case in second["runs"][0]["cases"]:
        kept = entries_of(case)
        case["entries"] = [{**kept["torch"], "to_ours": 7.25}, {**kept["pipeline"], "name": "sonicmoe", "to_ours": 3.5}]
    second["runs"][0]["cases"] = second["runs"][0]["cases"][:1]
    third = json.loads(json.dumps(record))
    third["runs"][0]["conditions"]["routing"] = "zipf"
    for name, content in (("2.json", second), ("3.json", third)):
        (tmp_path / name).write_text(json.dumps(content))
    source = f"source=[{measured / 'kernels.json'},2.json,3.json]"
    assert scatterfold("bench", "kernels", "report", source, "output=out").code == 0
    first, other = json.loads((tmp_path / "out" / "kernels.json").read_text())["runs"]
    assert other == third["runs"][0]
    assert first["commands"] == [*record["runs"][0]["commands"], "scatterfold bench kernels again"]
    assert len(first["cases"]) == 4 and first["cases"][1:] == record["runs"][0]["cases"][1:]
    merged, before = entries_of(first["cases"][0]), entries_of(record["runs"][0]["cases"][0])
    assert merged["torch"]["to_ours"] == 7.25 and merged["sonicmoe"]["to_ours"] == 3.5
    assert merged["pipeline"] == before["pipeline"] and merged["cpu"] == before["cpu"]
    text = (tmp_path / "out" / "kernels.md").read_text()
    assert "7.25" in text and "SonicMoE" in text and "zipf routing" in text


def test_a_report_replaces_the_tables_of_a_page(scatterfold, tmp_path, measured):
    shutil.copy(measured / "kernels.json", tmp_path / "a.json")
    begin, end = "<!-- scatterfold bench kernels: begin -->", "<!-- scatterfold bench kernels: end -->"
    (tmp_path / "page.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    words = ["bench", "kernels", "report", "source=a.json", "output=out"]
    assert scatterfold(*words, "page=page.md").code == 0
    text = (tmp_path / "page.md").read_text()
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"\n{end}\nafter\n")
    assert "\nold\n" not in text and "ours / (a)" in text and "t32d32f16e4k2" in text
    assert scatterfold(*words, "page=page.md").code == 0
    assert (tmp_path / "page.md").read_text() == text  # once more changes nothing
    (tmp_path / "bare.md").write_text("no markers")
    outcome = scatterfold(*words, "page=bare.md")
    assert outcome.code == 2 and "page=bare.md has no place for the tables" in outcome.line
    assert (tmp_path / "bare.md").read_text() == "no markers"
    assert "page=none.md cannot be read" in scatterfold(*words, "page=none.md").line
