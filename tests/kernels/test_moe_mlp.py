"""`moe_mlp` against a float64 loop over tokens and experts, by every backend that runs on a CPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from scatterfold.kernels import ACTIVATIONS, ConfigError, Routing, is_gated, moe_mlp

ON_CPU = ["torch", "cpu", "reference"]  # the others have files of their own
LEAVES = ("x", "w_in", "w_out", "b_in", "b_out", "weight")

# Error of a result, in norm, over its norm. At most six values between inputs and result (pre-activation, activation,
# its product with the weight, output; on the way back their gradients) are rounded to the dtype, each by less than its
# spacing at 1, which is 2^-10 for float16 and 2^-7 for bfloat16, halved. Sums are in float32 at least.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 6 * 2**-22, torch.float16: 6 * 2**-11, torch.bfloat16: 6 * 2**-8}


def scalar_activation(name, z):
    """Element by element, in Python floats; and its derivative."""
    if name == "silu":
        s = 1 / (1 + math.exp(-z))
        return z * s, s * (1 + z * (1 - s))
    if name == "gelu":
        phi = 0.5 * (1 + math.erf(z / math.sqrt(2)))
        return z * phi, phi + z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    if name == "clamped":  # the gate of clamped_swiglu
        g, slope = (z, 1.0) if z < 7 else (7.0, 0.0)
        s = 1 / (1 + math.exp(-1.702 * g))
        return g * s, slope * (s + g * 1.702 * s * (1 - s))
    if name == "clamped up":
        return min(max(z, -7.0), 7.0) + 1, float(abs(z) < 7)
    r = max(z, 0.0)
    return (r, float(z > 0)) if name == "relu" else (r * r, 2 * r)


class Activation(torch.autograd.Function):
    """`scalar_activation` over a tensor, so that the reference shares no formula with the code under test."""

    @staticmethod
    def forward(ctx, z, name):
        values = [scalar_activation(name, v) for v in z.tolist()]
        ctx.save_for_backward(torch.tensor([slope for _, slope in values], dtype=z.dtype))
        return torch.tensor([value for value, _ in values], dtype=z.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


class Problem:
    """Random inputs; a variable number of experts per token in shuffled order, some tokens and experts unused."""

    def __init__(
        self, tokens=17, width=8, expert_width=6, experts=5, activation="swiglu", dtype=torch.float64, bias=True,
        density=0.4, seed=0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        hidden = 2 * expert_width if is_gated(activation) else expert_width

        def randn(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

        self.activation, self.dtype, self.experts = activation, dtype, experts
        self.values = {
            "x": randn(tokens, width, scale=6.0 if activation == "clamped_swiglu" else 1.0),  # beyond its limits
            "w_in": randn(experts, hidden, width, scale=width**-0.5),
            "w_out": randn(experts, width, expert_width, scale=expert_width**-0.5),
            "b_in": randn(experts, hidden) if bias else None,
            "b_out": randn(experts, width) if bias else None,
        }
        token, expert = (torch.rand(tokens, experts, generator=generator) < density).nonzero(as_tuple=True)
        shuffle = torch.randperm(len(token), generator=generator)
        self.token, self.expert = token[shuffle], expert[shuffle]
        weight = torch.rand(len(token), generator=generator, dtype=torch.float64) + 0.1
        self.values["weight"] = weight.to(torch.promote_types(dtype, torch.float32))
        self.grad = randn(tokens, width)

    def leaves(self, dtype=None):
        return {
            name: None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
            for name, t in self.values.items()
        }

    def run(self, leaves, backend=None, **options):
        weight, x = leaves["weight"], leaves["x"]
        routing = Routing.from_assignments(self.token, self.expert, weight, len(x), self.experts)
        biases = {"b_in": leaves["b_in"], "b_out": leaves["b_out"]}
        return moe_mlp(
            x, leaves["w_in"], leaves["w_out"], routing, self.activation, backend=backend, **biases, **options
        )

    def ours(self, backend=None, **options):
        """Output and gradients."""
        leaves = self.leaves()
        out = self.run(leaves, backend, **options)
        out.backward(self.grad)
        return {"out": out.detach()} | {name: t.grad for name, t in leaves.items() if t is not None}

    def expected(self):
        """The same in float64, pair by pair."""
        leaves = self.leaves(torch.float64)
        x, w_in, w_out, b_in, b_out, weight = leaves.values()
        base = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "clamped_swiglu": "clamped"}.get(
            self.activation, self.activation
        )
        rows = [0.0 * row for row in x]
        for index, (token, expert) in enumerate(zip(self.token.tolist(), self.expert.tolist())):
            z = w_in[expert] @ x[token]
            z = z if b_in is None else z + b_in[expert]
            width = w_out.shape[2]
            if is_gated(self.activation):
                up = Activation.apply(z[width:], "clamped up") if base == "clamped" else z[width:]
                a = Activation.apply(z[:width], base) * up
            else:
                a = Activation.apply(z, base)
            y = w_out[expert] @ a
            y = y if b_out is None else y + b_out[expert]
            rows[token] = rows[token] + weight[index] * y
        out = torch.stack(rows) if rows else x * 1.0
        out.backward(self.grad.double())
        return {"out": out.detach()} | {
            name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items() if t is not None
        }


def check(problem, *args, **options):
    results, expected = problem.ours(*args, **options), problem.expected()
    assert results.keys() == expected.keys()
    for name, reference in expected.items():
        result = results[name]
        assert result.dtype == (problem.values["weight"].dtype if name == "weight" else problem.dtype), name
        assert (result.double() - reference).norm() <= TOLERANCE[problem.dtype] * reference.norm(), name


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_with_biases(activation, backend, recompute):
    check(Problem(activation=activation), backend, recompute=recompute)


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_each_dtype(backend, dtype, bias):
    check(Problem(width=24, expert_width=16, dtype=dtype, bias=bias), backend)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    "shape",
    [
        {"experts": 1, "density": 1.0},
        {"experts": 512, "tokens": 9, "density": 0.02},
        {"tokens": 0},
        {"tokens": 1, "density": 1.0},
        {"density": 0.0},
        {"width": 1, "expert_width": 1},
        {"width": 33, "expert_width": 7, "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_shapes_at_the_edge(backend, shape):
    check(Problem(**shape), backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gradients_by_finite_differences(activation, backend, recompute):
    problem = Problem(6, 4, 3, 4, activation, seed=3)

    def f(*values):
        return problem.run(dict(zip(LEAVES, values)), backend, recompute=recompute)

    assert torch.autograd.gradcheck(f, tuple(problem.leaves().values()), fast_mode=activation != "swiglu")


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 9),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_backends_agree_on_values_and_gradients(tokens, experts, density, bias, seed):
    problem = Problem(tokens, 3, 2, experts, "geglu", density=density, bias=bias, seed=seed)
    *fast, plain = (problem.ours(backend) for backend in ON_CPU)
    for results in fast:
        for name, expected in plain.items():
            torch.testing.assert_close(results[name], expected, rtol=1e-10, atol=1e-10)


def test_equal_experts_with_weights_summing_to_one_are_the_dense_mlp():
    torch.manual_seed(0)
    x, gate, up, down = torch.randn(11, 8), torch.randn(6, 8), torch.randn(6, 8), torch.randn(8, 6)
    experts = torch.stack([torch.randperm(5)[:3] for _ in range(11)])
    weights = torch.rand(11, 3).softmax(-1)
    w_in = torch.cat([gate, up]).expand(5, -1, -1).contiguous()
    out = moe_mlp(x, w_in, down.expand(5, -1, -1).contiguous(), Routing.from_topk(experts, weights, 5))
    dense = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ON_CPU)
def test_tokens_without_experts_give_zero_and_get_zero_gradient(backend):
    problem = Problem()
    used = problem.token != 2
    problem.token, problem.expert = problem.token[used], problem.expert[used]
    problem.values["weight"] = problem.values["weight"][used]
    results = problem.ours(backend)
    assert not results["out"][2].any() and not results["x"][2].any()


@pytest.mark.parametrize("backend", ON_CPU)
def test_padding_is_neither_read_nor_written(backend):
    problem = Problem()
    keep = torch.arange(len(problem.token)) % 3 != 0
    leaves, x = problem.leaves(), problem.leaves()["x"]
    poisoned = torch.where(keep, problem.values["weight"], torch.nan).requires_grad_()
    routing = Routing.from_assignments(problem.token, problem.expert, poisoned, len(x), problem.experts, keep=keep)
    tensors = [leaves[name] for name in ("w_in", "w_out")]
    biases = {name: leaves[name] for name in ("b_in", "b_out")}
    moe_mlp(x, *tensors, routing, backend=backend, **biases).backward(problem.grad)
    problem.token, problem.expert = problem.token[keep], problem.expert[keep]
    problem.values["weight"] = problem.values["weight"][keep]
    expected = problem.ours(backend)
    assert not poisoned.grad[~keep].any()
    assert torch.equal(poisoned.grad[keep], expected["weight"]) and torch.equal(x.grad, expected["x"])


@pytest.mark.parametrize("backend", ON_CPU)
def test_without_gradients_the_values_are_the_same(backend):
    problem = Problem(33, 16, 24, dtype=torch.float32)
    expected = problem.run(problem.leaves(), backend).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            plain = problem.run(problem.leaves(), backend)
        assert not plain.requires_grad and torch.equal(plain, expected)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("wanted", [*((name,) for name in LEAVES), ("x", "weight"), ("w_in", "b_out")], ids=str)
def test_gradients_that_nobody_needs_are_not_computed(wanted, backend):
    problem = Problem()
    leaves, every = problem.leaves(), problem.ours(backend)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    problem.run(leaves, backend).backward(problem.grad)
    for name, leaf in leaves.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, every[name])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_experts_without_tokens_get_zero_gradient_even_from_dirty_memory(backend):
    problem = Problem(40, dtype=torch.float32)
    used = problem.expert != 3
    problem.token, problem.expert = problem.token[used], problem.expert[used]
    problem.values["weight"] = problem.values["weight"][used]
    for _ in range(3):  # the second round finds the memory that the first one left
        garbage = [torch.full_like(t, torch.nan) for t in problem.values.values()]
        del garbage
        results = problem.ours(backend)
    assert not any(results[name][3].any() for name in ("w_in", "w_out", "b_in", "b_out"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_same_input_gives_the_same_bits_and_recomputing_too(backend, dtype):
    problem = Problem(64, 16, 16, 8, dtype=dtype)
    first = problem.ours(backend)
    for again in (problem.ours(backend), problem.ours(backend, recompute="all")):
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", ON_CPU)
def test_activation_checkpointing_changes_no_bit(backend):
    problem = Problem(dtype=torch.float32)
    leaves, plain = problem.leaves(), problem.ours(backend)
    checkpoint(problem.run, leaves, backend, use_reentrant=False).backward(problem.grad)
    assert all(torch.equal(leaf.grad, plain[name]) for name, leaf in leaves.items())


@pytest.mark.parametrize("backend", ON_CPU)
def test_expanded_gradients_and_strided_inputs(backend):
    problem = Problem(dtype=torch.float32, width=16, expert_width=16)
    leaves, strided = problem.leaves(), problem.leaves()
    strided["w_in"] = problem.values["w_in"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    problem.run(leaves, backend).sum().backward()
    problem.run(strided, backend).sum().backward()
    for name in LEAVES:
        torch.testing.assert_close(strided[name].grad, leaves[name].grad)


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_runs_in_half_precision_and_keeps_float32_gradients(backend):
    problem = Problem(width=16, expert_width=16, dtype=torch.float32)
    leaves, rounded = problem.leaves(), problem.leaves(torch.bfloat16)
    rounded["weight"] = problem.leaves()["weight"]
    with torch.autocast("cpu", torch.bfloat16):
        out = problem.run(leaves, backend)
    assert out.dtype == torch.bfloat16
    out.backward(problem.grad.bfloat16())
    expected = problem.run(rounded, backend)
    expected.backward(problem.grad.bfloat16())
    assert torch.equal(out, expected)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, rounded[name].grad.float())


ZEROS = torch.zeros(3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "activation='swish' is unknown, allowed: swiglu"),
        ({"backend": "cuda"}, "experts.backend='cuda' is unknown, allowed: null, triton"),
        ({"recompute": "some"}, "recompute='some' is unknown, allowed: none, all"),
        ({"activation": "relu"}, "w_in has shape (5, 12, 8), relu needs (5, 6, 8)"),
        ({"w_out": ZEROS}, "w_out has shape (3, 4), allowed: (E, D, F)"),
        ({"x": ZEROS}, "x has shape (3, 4), routing and w_out need (17, 8)"),
        ({"b_in": ZEROS}, "b_in has shape (3, 4), w_in and w_out need (5, 12)"),
        ({"b_out": ZEROS}, "b_out has shape (3, 4), w_in and w_out need (5, 8)"),
        ({"b_out": torch.zeros(5, 8)}, "b_out is torch.float32 and x torch.float64, allowed: the same dtype"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, message):
    problem = Problem(bias=False)
    routing = Routing.from_assignments(problem.token, problem.expert, problem.values["weight"], 17, 5)
    arguments = {name: problem.values[name] for name in ("x", "w_in", "w_out")} | {"routing": routing, **change}
    with pytest.raises(ConfigError) as error:
        moe_mlp(**arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
