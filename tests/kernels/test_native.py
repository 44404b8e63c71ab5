"""`moe_mlp_native` against a float64 loop over tokens and experts, and how it is compiled."""

import os
import subprocess
import sys

import pytest
import torch

from scatterfold.kernels.native import build, moe_mlp_native, native_refuses, passes
from scatterfold.tests.kernels.expert_problem import check
from scatterfold.tests.kernels.test_cpu import COUNTS
from scatterfold.tests.kernels.test_cpu import Problem as CpuProblem

CPU = torch.device("cpu")
REFUSED = native_refuses(CPU, torch.float32)
compiled = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))
DTYPES = [torch.float32, torch.bfloat16]
# With width and expert width: around a tile (12 or 6 rows, 32 or 16 columns), and more than one block of each kind.
SHAPES = [(16, 8), (7, 5), (33, 31), (64, 300), (540, 40)]


class Problem(CpuProblem):
    function = staticmethod(moe_mlp_native)


@pytest.fixture(autouse=True)
def any_number_of_rows(monkeypatch):
    monkeypatch.setattr(passes, "FEWEST_ROWS", dict.fromkeys(DTYPES, 0))


@compiled
@pytest.mark.parametrize(("width", "expert_width"), SHAPES)
@pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_shape(dtype, counts, width, expert_width):
    check(Problem(counts, dtype=dtype, width=width, expert_width=expert_width))


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_and_chunks(dtype, threads, monkeypatch):
    """More threads than blocks of columns share out the rows; an expert of several chunks adds up its gradients."""
    monkeypatch.setattr(passes, "LONGEST_CHUNK", 25)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for recompute in ("none", "all"):
            check(Problem(COUNTS["long"], dtype=dtype, width=70, expert_width=40), recompute=recompute)
    finally:
        torch.set_num_threads(before)


@compiled
def test_fewer_threads_than_asked_for_do_all_of_the_work():
    """OpenMP may give fewer, for its limits or inside another parallel region."""
    code = """
import torch
from scatterfold.tests.kernels.test_native import COUNTS, DTYPES, Problem, check, passes
torch.set_num_threads(4)
passes.FEWEST_ROWS = dict.fromkeys(DTYPES, 0)
check(Problem(COUNTS["long"], width=70, expert_width=40))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_THREAD_LIMIT": "2"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_repeats_are_equal_bit_for_bit_and_so_is_recomputation(dtype, recompute):
    problem = Problem(COUNTS["long"], dtype=dtype, width=70, expert_width=40)
    first, second = problem.ours(), problem.ours(recompute=recompute)
    assert all(torch.equal(first[name], second[name]) for name in first)


@compiled
def test_gradients_and_weights_in_any_layout():
    problem = Problem()
    expected = problem.ours()
    problem.grad = problem.grad.T.contiguous().T
    problem.inputs["x"] = problem.inputs["x"].T.contiguous().T
    for name in ("w_in", "w_out"):
        problem.inputs[name] = problem.inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    for name, value in problem.ours().items():
        assert torch.equal(value, expected[name])


@compiled
def test_few_rows_go_another_way_to_the_same_result(monkeypatch):
    monkeypatch.setattr(passes, "FEWEST_ROWS", dict.fromkeys(DTYPES, 1000))
    monkeypatch.setattr(passes, "library", None)  # would fail
    check(Problem(dtype=torch.bfloat16))


def test_without_a_compiler_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("SCATTERFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = build.library.__wrapped__()
    assert isinstance(found, build.BuildError) and "there is no C++ compiler" in str(found)
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'x.cpp:1: error: no such thing' >&2; exit 1; }\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    found = build.library.__wrapped__()
    assert str(found) == f"{failing} could not compile the kernels: x.cpp:1: error: no such thing"
    assert [path.name for path in build.cache_folder().iterdir()] == ["native.lock"]


@compiled
def test_processes_that_start_together_compile_once(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\n[ $1 = --version ] || echo compiled >> {tmp_path}/log\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    code = f"""
import os
os.environ.update(SCATTERFOLD_CACHE={str(tmp_path)!r}, CXX={str(compiler)!r})
from scatterfold.kernels.native.build import BuildError, library
assert not isinstance(library(), BuildError), library()
"""
    for process in [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]:
        assert process.wait(300) == 0
    assert (tmp_path / "log").read_text() == "compiled\n"
