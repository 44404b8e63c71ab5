"""`moe_mlp` against a float64 loop over tokens and experts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scatterfold.kernels import ACTIVATIONS, BACKENDS, ConfigError, Routing, is_gated, moe_mlp

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ON_CPU = [name for name in BACKENDS if name != "triton"]


def scalar_activation(name, z):
    silu, gelu = z / (1 + math.exp(-z)), 0.5 * z * (1 + math.erf(z / math.sqrt(2)))
    return {"silu": silu, "gelu": gelu, "relu": max(z, 0.0), "relu2": max(z, 0.0) ** 2}[name]


def loop_forward(x, w_in, w_out, pairs, activation):
    """Sum over (token, expert, weight) of weight * expert(x), element by element, in float64."""
    x, w_in, w_out = x.double(), w_in.double(), w_out.double()
    base = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}.get(activation, activation)
    width_f = w_out.shape[2]
    out = torch.zeros_like(x)
    for token, expert, weight in pairs:
        h = (w_in[expert] @ x[token]).tolist()
        if is_gated(activation):
            a = [scalar_activation(base, h[f]) * h[width_f + f] for f in range(width_f)]
        else:
            a = [scalar_activation(base, z) for z in h]
        out[token] += float(weight) * (w_out[expert] @ torch.tensor(a, dtype=torch.float64))
    return out


def problem(tokens, width, expert_width, experts, activation, dtype=torch.float64, seed=0, density=0.4):
    """Random weights and a routing with a variable number of experts per token, some tokens and experts unused."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * expert_width if is_gated(activation) else expert_width

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x, w_in, w_out = randn(tokens, width), randn(experts, rows, width), randn(experts, width, expert_width)
    chosen = torch.rand(tokens, experts, generator=generator) < density
    token, expert = chosen.nonzero(as_tuple=True)
    shuffle = torch.randperm(len(token), generator=generator)
    weight = torch.rand(len(token), generator=generator, dtype=torch.float64)
    weight = weight.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    return x, w_in, w_out, token[shuffle], expert[shuffle], weight


def run(inputs, activation, backend):
    x, w_in, w_out, token, expert, weight = inputs
    routing = Routing.from_assignments(token, expert, weight, x.shape[0], w_out.shape[0])
    return moe_mlp(x, w_in, w_out, routing, activation, backend=backend)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_equals_the_loop(backend, activation):
    inputs = problem(9, 5, 4, 6, activation)
    x, w_in, w_out, token, expert, weight = inputs
    expected = loop_forward(x, w_in, w_out, list(zip(token.tolist(), expert.tolist(), weight.tolist())), activation)
    torch.testing.assert_close(run(inputs, activation, backend), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_is_close_to_float64(dtype):
    inputs = problem(17, 16, 24, 5, "swiglu", dtype)
    x, w_in, w_out, token, expert, weight = inputs
    expected = loop_forward(x, w_in, w_out, list(zip(token.tolist(), expert.tolist(), weight.tolist())), "swiglu")
    result = run(inputs, "swiglu", None)
    assert result.dtype == dtype
    # Three roundings of a result of this size (pre-activation, activation, output), with room for their spread.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]
    assert (result.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_by_finite_differences(activation):
    x, w_in, w_out, token, expert, weight = problem(6, 4, 3, 4, activation, seed=3)

    def f(x, w_in, w_out, weight):
        return run((x, w_in, w_out, token, expert, weight), activation, "cpu")

    assert torch.autograd.gradcheck(f, (x, w_in, w_out, weight))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 9),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_backends_agree_on_values_and_gradients(tokens, experts, density, seed):
    results = []
    for backend in ON_CPU:
        inputs = problem(tokens, 3, 2, experts, "geglu", seed=seed, density=density)
        out = run(inputs, "geglu", backend)
        leaves = [inputs[0], inputs[1], inputs[2], inputs[5]]
        out.backward(torch.ones_like(out).cumsum(0))
        results.append([out, *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves)])
    for others in zip(*results):
        for fast in others[:-1]:
            torch.testing.assert_close(fast, others[-1], rtol=1e-10, atol=1e-10)


def test_equal_experts_with_weights_summing_to_one_are_the_dense_mlp():
    torch.manual_seed(0)
    x, gate, up, down = torch.randn(11, 8), torch.randn(6, 8), torch.randn(6, 8), torch.randn(8, 6)
    experts = torch.stack([torch.randperm(5)[:3] for _ in range(11)])
    weights = torch.rand(11, 3).softmax(-1)
    w_in = torch.cat([gate, up]).expand(5, -1, -1).contiguous()
    out = moe_mlp(x, w_in, down.expand(5, -1, -1).contiguous(), Routing.from_topk(experts, weights, 5))
    dense = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)


def test_tokens_without_experts_give_zero_and_get_zero_gradient():
    x, w_in, w_out, token, expert, weight = problem(8, 4, 3, 3, "swiglu")
    used = token != 2
    out = run((x, w_in, w_out, token[used], expert[used], weight[used]), "swiglu", None)
    out.sum().backward()
    assert torch.equal(out[2], torch.zeros(4, dtype=out.dtype))
    assert torch.equal(x.grad[2], torch.zeros(4, dtype=out.dtype))


def test_padding_is_neither_read_nor_written():
    x, w_in, w_out, token, expert, weight = problem(8, 4, 3, 3, "swiglu")
    keep = torch.arange(len(token)) % 3 != 0
    dense = run((x, w_in, w_out, token[keep], expert[keep], weight[keep]), "swiglu", None)
    poisoned = torch.where(keep, weight, torch.nan).detach().requires_grad_()
    routing = Routing.from_assignments(token, expert, poisoned, 8, 3, keep=keep)
    out = moe_mlp(x, w_in, w_out, routing)
    assert torch.equal(out, dense)
    out.sum().backward()
    assert torch.equal(poisoned.grad[~keep], torch.zeros(int((~keep).sum()), dtype=torch.float64))
    assert torch.isfinite(x.grad).all()


def test_without_gradients_the_values_are_the_same():
    inputs = problem(33, 16, 24, 5, "swiglu", torch.float32)
    with torch.no_grad():
        plain = run(inputs, "swiglu", "cpu")
    assert not plain.requires_grad
    assert torch.equal(plain, run(inputs, "swiglu", "cpu"))


def test_gradients_that_nobody_needs_are_not_computed():
    for wanted in ([0], [1], [2], [5], [0, 5], [1, 2]):
        inputs, every = problem(9, 5, 4, 6, "swiglu"), problem(9, 5, 4, 6, "swiglu")
        for i in (0, 1, 2, 5):
            inputs[i].requires_grad_(i in wanted)
        for each in (inputs, every):
            run(each, "swiglu", "cpu").square().sum().backward()
        for i in (0, 1, 2, 5):
            if i in wanted:
                torch.testing.assert_close(inputs[i].grad, every[i].grad)
            else:
                assert inputs[i].grad is None


def test_experts_without_tokens_get_zero_gradient_even_from_dirty_memory():
    inputs = problem(40, 8, 6, 5, "swiglu", torch.float32)
    used = inputs[4] != 3
    for _ in range(3):  # the second round finds the memory that the first one left
        garbage = torch.full((5, 12, 8), torch.nan)
        del garbage
        run((*inputs[:3], inputs[3][used], inputs[4][used], inputs[5][used]), "swiglu", "cpu").sum().backward()
    assert torch.equal(inputs[1].grad[3], torch.zeros(12, 8))
    assert torch.equal(inputs[2].grad[3], torch.zeros(8, 6))


def test_same_input_gives_the_same_bits():
    def once():
        inputs = problem(64, 16, 12, 8, "swiglu", torch.float32)
        out = run(inputs, "swiglu", None)
        out.square().sum().backward()
        return [out, *(inputs[i].grad for i in (0, 1, 2, 5))]

    for first, second in zip(once(), once()):
        assert torch.equal(first, second)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_saved_for_backward_is_x_and_the_pre_activation(activation):
    tokens, width, expert_width, experts = 32, 16, 24, 4
    inputs = problem(tokens, width, expert_width, experts, activation, torch.float32)
    routing = Routing.from_assignments(inputs[3], inputs[4], inputs[5], tokens, experts)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_mlp(*inputs[:3], routing, activation)
    assignments = int(routing.expert_offsets[-1])
    rows = (2 if is_gated(activation) else 1) * expert_width
    activations = 4 * (tokens * width + assignments * rows)
    tables = 3 * 4 * assignments + 4 * (tokens + 1)  # token, weight, and the same list seen by token
    weights = sum(w.numel() * 4 for w in inputs[1:3])
    assert sum(saved.values()) == activations + tables + weights


def test_autocast_runs_in_half_precision_and_keeps_float32_gradients():
    inputs = problem(16, 8, 8, 4, "swiglu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(inputs, "swiglu", None)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(inputs[i].grad.dtype == torch.float32 for i in (0, 1, 2, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "activation='swish' is unknown, allowed: swiglu"),
        ({"backend": "cuda"}, "experts.backend='cuda' is unknown, allowed: null, triton, torch, cpu, reference"),
        ({"activation": "relu"}, "w_in has shape"),
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, "x has shape (3, 4)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    x, w_in, w_out, token, expert, weight = problem(8, 4, 3, 3, "swiglu")
    routing = Routing.from_assignments(token, expert, weight, 8, 3)
    arguments = {"x": x, "w_in": w_in, "w_out": w_out, "routing": routing, **change}
    with pytest.raises(ConfigError, match="^" + message.replace("(", r"\(").replace(")", r"\)")):
        moe_mlp(**arguments)
