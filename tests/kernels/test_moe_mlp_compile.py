"""`moe_mlp` under torch.compile: one graph for any number of tokens, and operators that keep their contract."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from scatterfold.kernels import Routing, moe_mlp
from scatterfold.kernels.operators import NAMESPACE

BACKENDS = ["cpu", "torch"]  # triton: in triton/cases_moe_mlp.py
WIDTH, EXPERT_WIDTH, EXPERTS, TOP_K = 16, 8, 4, 2


@pytest.fixture(autouse=True)
def no_trace_left():
    torch._dynamo.reset()


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(EXPERTS, 2 * EXPERT_WIDTH, WIDTH), (EXPERTS, WIDTH, EXPERT_WIDTH), (EXPERTS, 2 * EXPERT_WIDTH)]
    return [torch.randn(*s, generator=generator).requires_grad_() for s in (*shapes, (EXPERTS, WIDTH))]


def batch(tokens):
    generator = torch.Generator().manual_seed(tokens)
    return (
        torch.randn(tokens, WIDTH, generator=generator).requires_grad_(),
        torch.rand(tokens, EXPERTS, generator=generator).requires_grad_(),
    )


def layer(backend, recompute="none", wrap=None):
    """Top-k routing and experts as one function of x (T, D) and scores (T, E)."""

    def experts(x, w_in, w_out, routing, b_in, b_out):
        return moe_mlp(x, w_in, w_out, routing, "geglu", backend, b_in=b_in, b_out=b_out, recompute=recompute)

    def run(x, scores, w_in, w_out, b_in, b_out):
        weights, chosen = scores.topk(TOP_K)
        routing = Routing.from_topk(chosen, weights, EXPERTS)
        return 2 * (wrap or (lambda f, *a: f(*a)))(experts, x + 1, w_in, w_out, routing, b_in, b_out)

    return run


def results(function, tokens):
    x, scores = batch(tokens)
    own = parameters()
    out = function(x, scores, *own)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in (x, scores, *own))]


def assert_same(function, expected, tokens):
    for ours, theirs in zip(results(function, tokens), results(expected, tokens), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_serves_every_number_of_tokens(backend, recompute):
    run, counter = layer(backend, recompute), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)

    def dynamic(x, scores, *own):
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(scores, 0)
        return compiled(x, scores, *own)

    for tokens in (7, 12, 40, 5):
        assert_same(dynamic, run, tokens)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_numbers_of_tokens_cost_one_more_trace_unasked(backend):
    run, counter = layer(backend), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for tokens in (7, 12, 40, 5):
        assert_same(compiled, run, tokens)
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_inside_the_graph(backend):
    def wrap(function, *args):
        return checkpoint(function, *args, use_reentrant=False)

    compiled = torch.compile(layer(backend, wrap=wrap), fullgraph=True, backend="aot_eager")
    assert_same(compiled, layer(backend), 9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_inference_mode(backend):
    run, own = layer(backend), parameters()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(*batch(9), *own), run(*batch(9), *own))


def test_assignments_in_any_order_are_traced_too():
    def run(token, expert, weight, x, w_in, w_out):
        return moe_mlp(x, w_in, w_out, Routing.from_assignments(token, expert, weight, len(x), EXPERTS))

    token, expert, (x, _) = torch.arange(9) % 5, torch.arange(9) // 5, batch(5)
    inputs = (token, expert, torch.rand(9), x, *parameters()[:2])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), run(*inputs))


@pytest.mark.parametrize(("backend", "save_z"), [("cpu", True), ("torch", False)])
def test_operator_contracts(backend, save_z):
    x, scores = batch(5)
    w_in, w_out, b_in, b_out = parameters()
    weights, chosen = scores.detach().topk(TOP_K)
    routing = Routing.from_topk(chosen, weights, EXPERTS)
    tables = (routing.token, routing.expert_offsets, routing.assignment, routing.token_offsets)
    inputs = (x, w_in, w_out, b_in, b_out, routing.weight.requires_grad_(), *tables)
    operators = getattr(torch.ops, NAMESPACE)
    forward = getattr(operators, f"moe_mlp_{backend}").default
    torch.library.opcheck(forward, (*inputs, "swiglu", save_z))
    plain = [t.detach() for t in inputs]
    out, z = forward(*plain, "swiglu", save_z)
    backward = getattr(operators, f"moe_mlp_{backend}_backward").default
    needs = [True, False, True, True, False, True]
    torch.library.opcheck(backward, (torch.ones_like(out), *plain, z, "swiglu", needs))
