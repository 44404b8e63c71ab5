"""`moe_mlp_torch` against a float64 loop over tokens and experts."""

import pytest
import torch

from scatterfold.kernels import ACTIVATIONS, Routing, is_gated
from scatterfold.kernels.activations import activate
from scatterfold.kernels.torch_backend import fits_grouped_mm, moe_mlp_torch

# Error in norm over the norm: at most six values between inputs and result are rounded to the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 6 * 2**-22, torch.float16: 6 * 2**-11, torch.bfloat16: 6 * 2**-9}
NAMES = ("x", "w_in", "w_out", "b_in", "b_out", "weight")


class Problem:
    """Random inputs, a variable number of experts per token, an expert and a token without any, NaN padding."""

    def __init__(
        self, activation="swiglu", dtype=torch.float32, width=16, expert_width=8, bias=True, padding=5, tokens=19
    ):
        generator = torch.Generator().manual_seed(0)
        experts = 5
        hidden = 2 * expert_width if is_gated(activation) else expert_width

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        chosen = torch.rand(tokens, experts, generator=generator) < 0.5
        chosen[:, 1], chosen[3:4] = False, False
        token, expert = chosen.nonzero(as_tuple=True)
        count = self.count = len(token)
        weight_dtype = torch.promote_types(dtype, torch.float32)
        self.activation, self.dtype = activation, dtype
        self.inputs = {
            "x": randn(tokens, width),
            "w_in": randn(experts, hidden, width) / width**0.5,
            "w_out": randn(experts, width, expert_width) / expert_width**0.5,
            "b_in": randn(experts, hidden) if bias else None,
            "b_out": randn(experts, width) if bias else None,
            "weight": torch.rand(count, generator=generator, dtype=torch.float64).to(weight_dtype),
        }
        routing = Routing.from_assignments(token, expert, self.inputs["weight"], tokens, experts)
        self.pairs = list(zip(routing.token.tolist(), sorted(expert.tolist()), strict=True))
        self.inputs["weight"] = torch.cat([routing.weight, torch.full((padding,), float("nan"), dtype=weight_dtype)])
        huge = torch.full((padding,), 2**30, dtype=torch.int32)
        self.routing = Routing(
            torch.cat([routing.token, huge]),
            self.inputs["weight"],
            routing.expert_offsets,
            torch.cat([routing.assignment, huge]),
            routing.token_offsets,
        )
        self.grad = randn(tokens, width)

    def leaves(self, dtype=None):
        return {
            name: None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
            for name, t in self.inputs.items()
        }

    def ours(self):
        leaves = self.leaves()
        out = run(self, leaves)
        out.backward(self.grad)
        return {"out": out.detach()} | {name: t.grad for name, t in leaves.items() if t is not None}

    def expected(self):
        leaves = self.leaves(torch.float64)
        x, w_in, w_out, b_in, b_out, weight = leaves.values()
        rows = [torch.zeros(x.shape[1], dtype=torch.float64)] * len(x)
        for index, (token, expert) in enumerate(self.pairs):
            h = w_in[expert] @ x[token]
            y = w_out[expert] @ activate(self.activation, h if b_in is None else h + b_in[expert])
            rows[token] = rows[token] + weight[index] * (y if b_out is None else y + b_out[expert])
        out = torch.stack(rows)
        out.backward(self.grad.double())
        return {"out": out.detach()} | {name: t.grad for name, t in leaves.items() if t is not None}


def run(problem, leaves):
    x, w_in, w_out, b_in, b_out, weight = leaves.values()
    return moe_mlp_torch(x, w_in, w_out, problem.routing.with_weight(weight), problem.activation, b_in, b_out)


def check(problem):
    results, expected = problem.ours(), problem.expected()
    assert results.keys() == expected.keys()
    for name, reference in expected.items():
        error = (results[name].double() - reference).norm()
        assert error <= TOLERANCE[problem.dtype] * reference.norm(), name


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
        problem = Problem(tokens=tokens)
        problem.routing = Routing.from_assignments(*torch.zeros(2, 0).long(), torch.zeros(0), tokens, 5)
        problem.inputs["weight"] = torch.zeros(0)
        results = problem.ours()
        assert results["out"].shape == (tokens, 16)
        assert all(not value.any() for value in results.values())


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
    leaves = {key: t.requires_grad_(key == name) for key, t in problem.leaves().items()}
    run(problem, leaves).backward(problem.grad)
    assert [key for key, t in leaves.items() if t.grad is not None] == [name]
    expected = problem.expected()[name]
    assert (leaves[name].grad.double() - expected).norm() <= TOLERANCE[problem.dtype] * expected.norm()


def test_compiles_without_graph_break():
    problem = Problem(padding=0)
    leaves, again = problem.leaves(), problem.leaves()
    expected = run(problem, leaves)
    expected.backward(problem.grad)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(problem, again)
    compiled.backward(problem.grad)
    assert torch.equal(compiled, expected)
    assert all(torch.equal(leaves[name].grad, again[name].grad) for name in NAMES)
