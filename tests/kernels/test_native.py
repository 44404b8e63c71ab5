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
# Width and expert width: around a tile (6 rows, 64 or 16 columns), and more than one block along the sum (192), of
# columns (768, half of them gate), of rows (36).
SHAPES = [(16, 8), (7, 5), (33, 31), (64, 420), (800, 40)]


class Problem(CpuProblem):
    function = staticmethod(moe_mlp_native)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize(("width", "expert_width"), SHAPES)
@pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_shape(dtype, counts, width, expert_width):
    check(Problem(counts, dtype=dtype, width=width, expert_width=expert_width))


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_and_pieces(dtype, threads, monkeypatch, set_threads):
    """More threads than blocks of columns share out the rows; an expert of several pieces adds up its gradients."""
    monkeypatch.setattr(passes, "LONGEST_PIECE", 25)
    set_threads(threads)
    for recompute in ("none", "all"):
        check(Problem(COUNTS["long"], dtype=dtype, width=70, expert_width=40), recompute=recompute)


@compiled
@pytest.mark.parametrize("longest", [1024, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_side_by_side_give_the_same_bits_each_time(dtype, longest, monkeypatch, set_threads):
    """Of so many experts, threads work on several at once, and add to the sums by token in turn."""
    monkeypatch.setattr(passes, "LONGEST_PIECE", longest)
    problem = Problem([17, 3, 20, 0, 19, 18, 2, 20, 16, 1, 20, 15], dtype=dtype, width=70, expert_width=40, bias=True)
    set_threads(1)
    expected = problem.ours()
    for threads in (2, 3, 4, 6):
        set_threads(threads)
        check(problem)
        results = [problem.ours() for _ in range(5)]
        for name, value in results[0].items():
            assert all(torch.equal(value, other[name]) for other in results)
            if threads < 4 and longest == 1024:  # an expert for each thread, and in one piece
                assert torch.equal(value, expected[name])


@compiled
def test_fewer_threads_than_asked_for_do_all_of_the_work():
    """OpenMP may give fewer, for its limits or inside another parallel region."""
    code = """
import torch
from scatterfold.tests.kernels.test_native import COUNTS, Problem, check
torch.set_num_threads(4)
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows(dtype, rows):
    for width, expert_width in SHAPES:
        check(Problem([rows, 0, rows], dtype=dtype, width=width, expert_width=expert_width, bias=True))


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
