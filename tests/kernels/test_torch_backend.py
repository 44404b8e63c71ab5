"""`moe_mlp_torch` against a float64 loop over tokens and experts."""

import pytest
import torch

from scatterfold.kernels import ACTIVATIONS
from scatterfold.kernels.torch_backend import fits_grouped_mm, moe_mlp_torch
from scatterfold.tests.kernels.expert_problem import (
    NAMES,
    TOLERANCE,
    ExpertProblem,
    check,
    check_without_assignments,
    only_gradient,
    run,
    some_experts,
)


class Problem(ExpertProblem):
    """A variable number of experts per token, an expert and a token without any."""

    function = staticmethod(moe_mlp_torch)

    def __init__(
        self, activation="swiglu", dtype=torch.float32, width=16, expert_width=8, bias=True, padding=5, tokens=19
    ):
        generator = torch.Generator().manual_seed(0)
        pairs = some_experts(tokens, generator)
        super().__init__(pairs, tokens, 5, generator, activation, dtype, bias, padding, width, expert_width)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation(activation):
    check(Problem(activation))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_each_dtype(dtype):
    check(Problem(dtype=dtype, bias=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths_that_grouped_mm_refuses(dtype):
    assert not fits_grouped_mm(dtype, 7, 5)
    check(Problem(dtype=dtype, width=7, expert_width=5))


def test_float64_takes_one_gemm_per_expert_and_passes_gradcheck():
    problem = Problem(dtype=torch.float64, width=3, expert_width=2, tokens=5, padding=0)
    leaves = problem.leaves()

    def function(*tensors):
        return run(problem, dict(zip(NAMES, tensors)))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


def test_no_token_and_no_assignment():
    for tokens in (0, 4):
        check_without_assignments(Problem(tokens=tokens), (tokens, 16))


def test_an_expanded_gradient_is_taken():
    problem = Problem()
    leaves = problem.leaves()
    run(problem, leaves).sum().backward()
    problem.grad = torch.ones_like(problem.grad)
    assert torch.equal(leaves["x"].grad, problem.ours()["x"])


def test_repeats_are_equal_bit_for_bit():
    problem = Problem(dtype=torch.bfloat16)
    first, second = problem.ours(), problem.ours()
    assert all(first[name].nan_to_num(7).equal(second[name].nan_to_num(7)) for name in first)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_saved_bytes_follow_the_formula(activation):
    problem = Problem(activation, torch.bfloat16, bias=False)
    leaves, saved = problem.leaves(), {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(problem, leaves)
    x, w_in, w_out = (leaves[name] for name in NAMES[:3])
    rows, tables = problem.routing.token.numel(), problem.routing
    table_bytes = 4 * (3 * rows + tables.expert_offsets.numel() + tables.token_offsets.numel())
    parameters = 2 * (w_in.numel() + w_out.numel())  # saved by reference, no activation memory
    assert sum(saved.values()) == 2 * x.numel() + 2 * rows * w_in.shape[1] + table_bytes + parameters


@pytest.mark.parametrize("name", NAMES)
def test_only_the_needed_gradient(name):
    problem = Problem()
    expected = problem.expected()[name]
    assert (only_gradient(problem, name).double() - expected).norm() <= TOLERANCE[problem.dtype] * expected.norm()


def test_compiles_without_graph_break():
    problem = Problem(padding=0)
    leaves, again = problem.leaves(), problem.leaves()
    expected = run(problem, leaves)
    expected.backward(problem.grad)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(problem, again)
    compiled.backward(problem.grad)
    assert torch.equal(compiled, expected)
    assert all(torch.equal(leaves[name].grad, again[name].grad) for name in NAMES)
