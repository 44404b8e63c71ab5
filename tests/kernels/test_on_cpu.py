"""What the two backends for CPU, `cpu` and `native`, are both asked."""

import pytest
import torch

from scatterfold.kernels import ACTIVATIONS
from scatterfold.tests.kernels import test_cpu, test_native
from scatterfold.tests.kernels.expert_problem import NAMES, check, check_without_assignments, only_gradient, run
from scatterfold.tests.kernels.test_cpu import COUNTS


@pytest.fixture(params=["cpu", pytest.param("native", marks=test_native.compiled)])
def Problem(request):
    return {"cpu": test_cpu.Problem, "native": test_native.Problem}[request.param]


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation(Problem, activation, bias, recompute):
    check(Problem(activation=activation, bias=bias), recompute=recompute)


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_no_token_and_no_assignment(Problem, tokens, recompute):
    problem = Problem()
    problem.inputs["x"], problem.grad = torch.ones(tokens, 16), torch.ones(tokens, 16)
    check_without_assignments(problem, (tokens, 16), recompute=recompute)


def test_experts_without_rows_do_not_touch_their_weights(Problem):
    problem = Problem(COUNTS["gaps"])
    for name in ("w_in", "w_out", "b_in", "b_out"):
        problem.inputs[name][[0, 2, 3, 6]] = torch.nan
    results = problem.ours()
    assert results["out"].isfinite().all() and results["x"].isfinite().all()
    assert all(not results[name][[0, 2, 3, 6]].any() for name in ("w_in", "w_out", "b_in", "b_out"))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_needed_gradient(Problem, name):
    problem = Problem()
    assert torch.equal(only_gradient(problem, name), problem.ours()[name])


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_compiles_without_graph_break(Problem, recompute):
    torch._dynamo.reset()
    problem = Problem()
    leaves, again = problem.leaves(), problem.leaves()
    expected = run(problem, leaves, recompute=recompute)
    expected.backward(problem.grad)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(problem, again, recompute=recompute)
    compiled.backward(problem.grad)
    assert torch.equal(compiled, expected)
    assert all(torch.equal(leaves[name].grad, again[name].grad) for name in NAMES)
