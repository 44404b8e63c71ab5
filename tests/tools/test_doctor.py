"""`scatterfold doctor`: what it finds, and that it finds what is broken."""

import json
import shutil

import pytest
import torch

from scatterfold.kernels import BACKENDS
from scatterfold.tools.doctor import choices

SHAPES = len(choices.SHAPES) * len(choices.DTYPES)


def test_a_sound_machine(scatterfold, tmp_path):
    outcome = scatterfold("doctor", "json=doctor.json", "run_dir=not/there/yet")
    assert outcome.code == 0 and not outcome.err
    assert "checks passed" in outcome.out and "FAILED" not in outcome.out
    record = json.loads((tmp_path / "doctor.json").read_text())
    assert record["passed"]
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["versions"]) >= {"python", "triton", "transformers", "megatron-core", "deepspeed", "hydra-core"}
    assert record["cpu"]["threads"] == torch.get_num_threads() and record["cpu"]["name"]
    assert len(record["gpus"]) == torch.cuda.device_count()
    free = shutil.disk_usage(tmp_path).free
    assert abs(record["disk"]["free_bytes"] - free) < 2**30
    on_cpu = [choice for choice in record["backends"] if choice["device"] == "cpu"]
    assert len(on_cpu) == SHAPES and all(choice["why"] for choice in on_cpu)
    checked = {(check["backend"], check["dtype"]) for check in record["checks"] if check["device"] == "cpu"}
    assert checked >= {(backend, dtype) for backend in ("cpu", "torch") for dtype in ("fp32", "bf16", "fp16")}
    assert not (tmp_path / "not").exists()


def test_each_backend_is_compared_in_output_and_every_gradient(scatterfold, tmp_path):
    scatterfold("doctor", "json=doctor.json")
    checks = json.loads((tmp_path / "doctor.json").read_text())["checks"]
    names = [check["name"] for check in checks if (check["device"], check["backend"]) == ("cpu", "torch")]
    assert len(names) == 3 * 5 and len(set(names)) == 5
    assert all(0 < check["error"] <= check["allowed"] for check in checks)


def scales_the_output(x, *rest, **options):
    return 1.1 * BACKENDS["reference"](x, *rest, **options)


def spoils_one_gradient(x, w_in, w_out, routing, *rest, **options):
    return BACKENDS["reference"](x, w_in.detach() + 0.9 * (w_in - w_in.detach()), w_out, routing, *rest, **options)


def not_a_number(x, *rest, **options):
    return BACKENDS["reference"](x, *rest, **options) * float("nan")


@pytest.mark.parametrize(
    ("broken", "failures"),
    [
        (scales_the_output, {"output", "gradient of x", "gradient of w_in", "gradient of w_out"}),
        (spoils_one_gradient, {"gradient of w_in"}),
        (not_a_number, {"output"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_kernel_that_computes_something_wrong(scatterfold, tmp_path, monkeypatch, broken, failures):
    monkeypatch.setitem(BACKENDS, "torch", broken)
    outcome = scatterfold("doctor", "json=doctor.json")
    assert outcome.code == 1
    assert "checks failed" in outcome.line
    assert "FAILED" in outcome.out
    record = json.loads((tmp_path / "doctor.json").read_text())
    assert not record["passed"]
    failed = {(check["backend"], check["name"]) for check in record["checks"] if not check["passed"]}
    assert failed >= {("torch", name) for name in failures}
    assert {backend for backend, _ in failed} == {"torch"}


def test_a_kernel_that_raises_has_failed(scatterfold, monkeypatch):
    def broken(*inputs, **options):
        raise RuntimeError("illegal\ninstruction")

    monkeypatch.setitem(BACKENDS, "cpu", broken)
    outcome = scatterfold("doctor")
    assert outcome.code == 1
    assert "RuntimeError: illegal instruction" in outcome.out


def test_a_forced_backend_is_shown(scatterfold, tmp_path, monkeypatch):
    monkeypatch.setenv("SCATTERFOLD_BACKEND", "torch")
    outcome = scatterfold("doctor", "json=doctor.json")
    assert outcome.code == 0 and "forced by SCATTERFOLD_BACKEND" in outcome.out
    backends = json.loads((tmp_path / "doctor.json").read_text())["backends"]
    assert {choice["backend"] for choice in backends} == {"torch"}


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (["jsno=x"], None, "jsno=x is unknown (did you mean json?)"),
        (["json=nowhere/x.json"], None, "nowhere/x.json"),
        ([], "cuda9", "SCATTERFOLD_BACKEND='cuda9' is unknown"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(scatterfold, monkeypatch, words, environment, expected):
    if environment:
        monkeypatch.setenv("SCATTERFOLD_BACKEND", environment)
    outcome = scatterfold("doctor", *words)
    assert outcome.code == 2 and expected in outcome.line


def test_triton_kernels_are_checked_where_its_interpreter_runs_them(spawn, tmp_path):
    pytest.importorskip("triton")
    outcome = spawn(tmp_path, "doctor", "json=doctor.json", TRITON_INTERPRET="1")
    if "only 0-dimensional arrays can be converted" in outcome.out:
        pytest.skip("the interpreter of this triton does not work with this numpy")
    assert outcome.code == 0, outcome.out + outcome.err
    checks = json.loads((tmp_path / "doctor.json").read_text())["checks"]
    assert sum(check["backend"] == "triton" for check in checks) == 3 * 5
