"""`moe_mlp_triton` against a float64 loop over tokens and experts on the rounded inputs; run by test_interpreter.py."""

import contextlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from scatterfold.kernels import ACTIVATIONS, Routing, is_gated, moe_mlp
from scatterfold.kernels.activations import activate
from scatterfold.kernels.triton_backend import configs, launch, moe_mlp_triton, weight_grad
from scatterfold.kernels.triton_backend.configs import Config

pytestmark = pytest.mark.usefixtures("poisoned")

# Error of a result, in norm, over its norm: at most six values between inputs and result are rounded to the dtype.
# The interpreter cuts bfloat16 off instead of rounding, so its unit is 2^-8 there.
TOLERANCE = {torch.float32: 6 * 2**-22, torch.float16: 6 * 2**-11, torch.bfloat16: 6 * 2**-8}
NAMES = ("x", "w_in", "w_out", "b_in", "b_out", "weight")


class Problem:
    """Random inputs in a dtype, held inside larger buffers of NaN, with a variable number of experts per token."""

    def __init__(
        self, tokens=21, width=24, expert_width=20, experts=5, activation="swiglu", dtype=torch.float32, bias=False,
        choose=None, seed=0,
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.activation, self.dtype = activation, dtype
        hidden = 2 * expert_width if is_gated(activation) else expert_width
        self.x = self.framed(tokens, width, scale=6.0 if activation == "clamped_swiglu" else 1.0)  # beyond its limits
        self.w_in = self.framed(experts, hidden, width, scale=width**-0.5)
        self.w_out = self.framed(experts, width, expert_width, scale=expert_width**-0.5)
        self.b_in = self.framed(experts, hidden).contiguous() if bias else None
        self.b_out = self.framed(experts, width).contiguous() if bias else None
        chosen = torch.rand(tokens, experts, generator=self.generator) < 0.4
        chosen[:, 1:2] = False  # an expert without tokens
        chosen[3:4] = False  # a token without experts
        if choose is not None:
            chosen = choose(chosen)
        self.token, self.expert = chosen.nonzero(as_tuple=True)
        self.weight = torch.rand(len(self.token), generator=self.generator) + 0.1
        self.grad = torch.randn(tokens, width, generator=self.generator).to(dtype)

    def framed(self, *shape, scale=1.0):
        """A tensor whose rows end in 8 elements of NaN that no kernel may let into a result."""
        frame = torch.full((*shape[:-1], shape[-1] + 8), float("nan"), dtype=self.dtype)
        frame[..., : shape[-1]] = (scale * torch.randn(*shape, generator=self.generator)).to(self.dtype)
        return frame[..., : shape[-1]]

    def leaves(self, dtype=None):
        tensors = [getattr(self, name) for name in NAMES]
        return [
            None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors
        ]  # detach keeps the strides, so the frame stays around the tensor

    def routing(self, weight):
        return Routing.from_assignments(self.token, self.expert, weight, len(self.x), len(self.w_in))

    def ours(self, routing_of=None, **options):
        """Output and gradients by the kernels."""
        leaves = self.leaves()
        x, w_in, w_out, b_in, b_out, weight = leaves
        routing = (routing_of or self.routing)(weight)
        out = moe_mlp_triton(x, w_in, w_out, routing, self.activation, b_in, b_out, **options)
        out.backward(self.grad)
        return [out.detach(), *(t.grad for t in leaves if t is not None)]

    def expected(self):
        """The same in float64, one (token, expert) pair after the other."""
        leaves = self.leaves(torch.float64)
        x, w_in, w_out, b_in, b_out, weight = leaves
        rows = [torch.zeros(x.shape[1], dtype=torch.float64) for _ in x]
        for token, expert, w in zip(self.token.tolist(), self.expert.tolist(), weight):
            h = w_in[expert] @ x[token]
            if b_in is not None:
                h = h + b_in[expert]
            y = w_out[expert] @ activate(self.activation, h)
            if b_out is not None:
                y = y + b_out[expert]
            rows[token] = rows[token] + w * y
        out = torch.stack(rows)
        out.backward(self.grad.double())
        return [out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves if t is not None)]


def assert_close(results, expected, dtype):
    assert len(results) == len(expected)
    for result, reference in zip(results, expected):
        assert result.shape == reference.shape
        assert not result.isnan().any()
        assert (result.double() - reference).norm() <= TOLERANCE[dtype] * reference.norm()


def check(problem, **options):
    assert_close(problem.ours(**options), problem.expected(), problem.dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_with_biases(activation):
    check(Problem(activation=activation, bias=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(Problem(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["geglu", "relu2"])
def test_half_precision_with_biases_in_odd_sizes(activation, dtype):
    check(Problem(tokens=13, width=37, expert_width=11, activation=activation, dtype=dtype, bias=True))


def test_many_experts():
    def few(chosen):
        return chosen & (torch.arange(512) % 7 == 0) & (torch.rand(chosen.shape) < 0.1)

    check(Problem(tokens=5, width=8, expert_width=4, experts=512, choose=few, bias=True))


def test_the_public_function_takes_the_kernels_with_tables_from_the_device(monkeypatch):
    monkeypatch.setenv("SCATTERFOLD_BACKEND", "triton")
    problem, results = Problem(tokens=13, bias=True, dtype=torch.float16), {}
    for recompute in ("none", "all"):
        leaves = problem.leaves()
        x, w_in, w_out, b_in, b_out, weight = leaves
        out = moe_mlp(x, w_in, w_out, problem.routing(weight), b_in=b_in, b_out=b_out, recompute=recompute)
        out.backward(problem.grad)
        results[recompute] = [out.detach(), *(t.grad for t in leaves)]
        assert_close(results[recompute], problem.expected(), problem.dtype)
    assert all(torch.equal(a, b) for a, b in zip(*results.values()))


@pytest.mark.parametrize(("width", "expert_width"), [(16, 16), (33, 7), (1, 1)])
def test_widths_that_fit_the_tile_and_that_do_not(width, expert_width):
    check(Problem(tokens=11, width=width, expert_width=expert_width))


def one_expert(chosen):
    chosen[:], chosen[:, 2] = False, True
    return chosen


@pytest.mark.parametrize("choose", [one_expert, torch.ones_like], ids=["one expert takes all", "all experts"])
def test_skewed_and_full_routing(choose):
    check(Problem(choose=choose, tokens=18))


@pytest.mark.parametrize("choose", [None, one_expert], ids=["some", "one expert takes all"])
def test_weight_gradients_summed_from_chunks_of_rows(choose, monkeypatch):
    launched = []
    monkeypatch.setattr(launch, "_LEAST_CHUNK", 1)
    run = launch.launch

    def watched(kernel, *args, **options):
        launched.append(kernel)
        run(kernel, *args, **options)

    monkeypatch.setattr(launch, "launch", watched)
    check(Problem(tokens=150, width=16, expert_width=8, choose=choose, experts=4))
    assert weight_grad.sum_chunks_kernel in launched


def test_one_expert_and_one_token():
    check(Problem(experts=1, tokens=9, choose=torch.ones_like))
    check(Problem(tokens=1, experts=3, choose=torch.ones_like, activation="relu2"))


def test_no_assignment_and_no_token():
    for tokens in (0, 5):
        out, *grads = Problem(tokens=tokens, choose=torch.zeros_like).ours()
        assert torch.equal(out, torch.zeros(tokens, 24)) and all(not grad.any() for grad in grads)


@pytest.mark.parametrize(
    "config",
    [
        Config(16, 16, 16, tma=False),
        Config(16, 16, 16, parts=2, persistent=True),
        Config(32, 16, 32, parts=4, tma=False, persistent=True, group_m=8),
    ],
    ids=["pointers", "persistent, two parts", "pointers, persistent, four parts"],
)
def test_each_variant_of_the_kernels(config):
    kernels = ("up", "rows", "rows_k", "dact", "weight_grad")
    with configs.forced(dict.fromkeys(kernels, config)):
        check(Problem(tokens=30))
        check(Problem(tokens=12, activation="gelu", expert_width=32))


def test_padding_is_never_read_and_gets_no_gradient():
    problem = Problem(bias=True)
    count = len(problem.token)

    def padded(weight):
        routing = problem.routing(weight)
        huge = torch.full((9,), 2**30, dtype=torch.int32)
        nan = torch.full((9,), float("nan"))
        padded.weight = torch.cat([routing.weight.detach(), nan]).requires_grad_()
        return Routing(
            torch.cat([routing.token, huge]),
            padded.weight,
            routing.expert_offsets,
            torch.cat([routing.assignment, -huge]),
            routing.token_offsets,
        )

    results, expected = problem.ours(padded)[:-1], problem.expected()
    order = problem.routing(torch.arange(count)).weight
    grad = padded.weight.grad
    assert not grad[count:].any()
    assert_close([*results, grad[:count]], [*expected[:-1], expected[-1][order]], problem.dtype)


def test_recomputing_everything_changes_no_bit():
    problem = Problem(tokens=12, dtype=torch.bfloat16, bias=True)
    first, again, recomputed = problem.ours(), problem.ours(), problem.ours(recompute="all")
    for a, b, c in zip(first, again, recomputed):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_needed_gradients_are_computed(name):
    problem = Problem(bias=True)
    leaves = problem.leaves()
    for other, leaf in zip(NAMES, leaves):
        leaf.requires_grad_(other == name)
    x, w_in, w_out, b_in, b_out, weight = leaves
    moe_mlp_triton(x, w_in, w_out, problem.routing(weight), "swiglu", b_in, b_out).backward(problem.grad)
    grads = [leaf.grad for leaf in leaves]
    index = NAMES.index(name)
    assert all((grad is None) == (i != index) for i, grad in enumerate(grads))
    assert_close([grads[index]], [problem.expected()[1 + index]], problem.dtype)


def test_inference_mode_expanded_gradients_and_checkpointing():
    problem = Problem()
    x, w_in, w_out, _, _, weight = problem.leaves()
    routing = problem.routing(weight)
    expected = problem.expected()[0]
    with torch.inference_mode():
        assert_close([moe_mlp_triton(x, w_in, w_out, routing, "swiglu")], [expected], problem.dtype)
    moe_mlp_triton(x, w_in, w_out, routing, "swiglu").sum().backward()  # its gradient has strides of 0
    plain, x.grad = x.grad, None
    routing = problem.routing(weight)
    checkpoint(moe_mlp_triton, x, w_in, w_out, routing, "swiglu", use_reentrant=False).sum().backward()
    assert torch.equal(plain, x.grad)


def test_one_graph_serves_every_number_of_tokens():
    torch._dynamo.reset()
    problem, counter = Problem(tokens=5, experts=3, bias=True), CompileCounterWithBackend("aot_eager")
    _, *own, _ = problem.leaves()

    def run(x, scores, w_in, w_out, b_in, b_out):
        weights, chosen = scores.topk(2)
        routing = Routing.from_topk(chosen, weights, 3)
        return moe_mlp_triton(2 * x, w_in, w_out, routing, "swiglu", b_in, b_out) + 1

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    with without_poison():
        for tokens in (3, 7):
            x, scores = torch.randn(tokens, 24, requires_grad=True), torch.rand(tokens, 3, requires_grad=True)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(scores, 0)
            results = []
            for function in (compiled, run):
                out = function(x, scores, *own)
                results.append([out, *torch.autograd.grad(out.square().sum(), [x, scores, *own])])
            assert all(torch.equal(a, b) for a, b in zip(*results))
    assert counter.frame_count == 1


@contextlib.contextmanager
def without_poison():
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


def test_operator_contracts():
    problem = Problem(tokens=2, experts=2, bias=True)
    x, w_in, w_out, b_in, b_out, weight = (t.detach().contiguous().requires_grad_() for t in problem.leaves())
    routing = problem.routing(weight.detach())
    tables = (routing.token, routing.expert_offsets, routing.assignment, routing.token_offsets)
    weight = routing.weight.clone().requires_grad_()
    with without_poison():
        torch.library.opcheck(
            torch.ops.scatterfold.moe_mlp_triton.default, (x, w_in, w_out, b_in, b_out, weight, *tables, "swiglu", True)
        )
