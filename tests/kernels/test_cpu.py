"""`moe_mlp_cpu` against a float64 loop over tokens and experts."""

import pytest
import torch

from scatterfold.kernels import ACTIVATIONS, Routing, is_gated
from scatterfold.kernels.activations import activate
from scatterfold.kernels.cpu import moe_mlp_cpu
from scatterfold.kernels.cpu.chunks import split

# Error in norm over the norm: at most six values between inputs and result are rounded to the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 6 * 2**-22, torch.float16: 6 * 2**-11, torch.bfloat16: 6 * 2**-9}
NAMES = ("x", "w_in", "w_out", "b_in", "b_out", "weight")
# Rows of each expert: few and alike, so they are batched; with gaps; long and short; above what one slot rounds to.
COUNTS = {
    "alike": (5, 4, 6, 5, 5),
    "gaps": (0, 3, 0, 0, 7, 2, 0),
    "uneven": (1, 70, 2, 0, 33, 41),
    "long": (150, 131, 140),
    "one": (0, 0, 90, 0),
}


class Problem:
    """Random inputs with given rows per expert, a token without any, and padding that is poisoned."""

    def __init__(self, counts=(5, 0, 4, 6), activation="swiglu", dtype=torch.float32, bias=True, padding=5, width=16):
        generator = torch.Generator().manual_seed(0)
        experts, expert_width = len(counts), 8
        tokens = max(counts) + 3
        hidden = 2 * expert_width if is_gated(activation) else expert_width

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        chosen = [torch.randperm(tokens - 1, generator=generator)[:count] for count in counts]  # never the last token
        token = torch.cat(chosen)
        expert = torch.repeat_interleave(torch.arange(experts), torch.tensor(counts))
        weight_dtype = torch.promote_types(dtype, torch.float32)
        weight = torch.rand(len(token), generator=generator, dtype=torch.float64).to(weight_dtype)
        self.activation, self.dtype, self.count = activation, dtype, len(token)
        routing = Routing.from_assignments(token, expert, weight, tokens, experts)
        self.pairs = list(zip(routing.token.tolist(), expert.tolist(), strict=True))
        huge = torch.full((padding,), 2**30, dtype=torch.int32)
        self.routing = Routing(
            torch.cat([routing.token, huge]),
            torch.cat([routing.weight, torch.full((padding,), torch.nan, dtype=weight_dtype)]),
            routing.expert_offsets,
            torch.cat([routing.assignment, huge]),
            routing.token_offsets,
        )
        self.inputs = {
            "x": randn(tokens, width),
            "w_in": randn(experts, hidden, width) / width**0.5,
            "w_out": randn(experts, width, expert_width) / expert_width**0.5,
            "b_in": randn(experts, hidden) if bias else None,
            "b_out": randn(experts, width) if bias else None,
            "weight": self.routing.weight,
        }
        self.grad = randn(tokens, width)

    def leaves(self, dtype=None):
        return {
            name: None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
            for name, t in self.inputs.items()
        }

    def ours(self, recompute="none"):
        leaves = self.leaves()
        out = run(self, leaves, recompute)
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


def run(problem, leaves, recompute="none"):
    x, w_in, w_out, b_in, b_out, weight = leaves.values()
    routing = problem.routing.with_weight(weight)
    return moe_mlp_cpu(x, w_in, w_out, routing, problem.activation, b_in, b_out, recompute)


def check(problem, recompute="none"):
    results, expected = problem.ours(recompute), problem.expected()
    assert results.keys() == expected.keys()
    for name, reference in expected.items():
        assert results[name].isfinite().all(), name
        error = (results[name].double() - reference).norm()
        assert error <= TOLERANCE[problem.dtype] * reference.norm(), name


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation(activation, bias, recompute):
    check(Problem(activation=activation, bias=bias), recompute)


@pytest.mark.parametrize("padding", [0, 5, 40])  # of routing: where the last expert's slot does and does not fit
@pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_each_dtype_and_layout(dtype, counts, padding):
    check(Problem(counts, dtype=dtype, padding=padding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute_in_each_layout(dtype):
    for counts in COUNTS.values():
        check(Problem(counts, dtype=dtype), "all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_width(dtype):
    check(Problem(dtype=dtype, width=7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_cover_each_row_once(dtype):
    counts = torch.randint(0, 200, (64,), generator=torch.Generator().manual_seed(0))
    offsets = [0, *counts.cumsum(0).tolist()]
    chunks = split(offsets, 512, dtype, batch=True)
    found = []
    for chunk in chunks:
        experts = [e for slots, own in chunk.runs for e in range(own.start, own.stop)]
        assert sum(slots.stop - slots.start for slots, _ in chunk.runs) == chunk.slots == len(experts)
        assert chunk.rows == slice(offsets[experts[0]], offsets[experts[-1] + 1])
        assert max(chunk.counts) <= chunk.height
        found += zip(experts, chunk.counts)
    assert found == [(e, n) for e, n in enumerate(counts.tolist()) if n]


def test_heights_in_half_precision_take_few_values():
    heights = {split([0, n], 512, torch.bfloat16, batch=True)[0].height for n in range(1, 4097)}
    assert len(heights) < 170  # so that six GEMMs of each fit the cache of generated code


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_by_finite_differences(activation, recompute):
    problem = Problem((2, 0, 3), activation, torch.float64, padding=0, width=3)

    def function(*tensors):
        return run(problem, dict(zip(NAMES, tensors)), recompute)

    assert torch.autograd.gradcheck(function, tuple(problem.leaves().values()), fast_mode=True)


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_no_token_and_no_assignment(tokens, recompute):
    problem = Problem()
    empty = Routing.from_assignments(*torch.zeros(2, 0).long(), torch.zeros(0), tokens, 4)
    problem.routing, problem.inputs["weight"] = empty, empty.weight
    problem.inputs["x"], problem.grad = torch.ones(tokens, 16), torch.ones(tokens, 16)
    results = problem.ours(recompute)
    assert results["out"].shape == (tokens, 16)
    assert all(not value.any() for value in results.values())


def test_padding_gets_zero_gradient():
    problem = Problem()
    assert not problem.ours()["weight"][problem.count :].any()


def test_experts_without_rows_do_not_touch_their_weights():
    problem = Problem(COUNTS["gaps"])
    for name in ("w_in", "w_out", "b_in", "b_out"):
        problem.inputs[name][[0, 2, 3, 6]] = torch.nan
    results = problem.ours()
    assert results["out"].isfinite().all() and results["x"].isfinite().all()
    assert all(not results[name][[0, 2, 3, 6]].any() for name in ("w_in", "w_out", "b_in", "b_out"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
def test_repeats_are_equal_bit_for_bit(counts, dtype):
    problem = Problem(counts, dtype=dtype)
    first, second = problem.ours(), problem.ours()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recomputing_gives_the_same_bits():
    for counts in COUNTS.values():
        problem = Problem(counts)
        kept, again = problem.ours("none"), problem.ours("all")
        assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_gradients_and_weights_in_any_layout():
    problem = Problem()
    expected = problem.ours()
    problem.grad = problem.grad.T.contiguous().T
    problem.inputs["x"] = problem.inputs["x"].T.contiguous().T
    for name in ("w_in", "w_out"):
        problem.inputs[name] = problem.inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    for name, value in problem.ours().items():
        torch.testing.assert_close(value, expected[name])


def test_an_expanded_gradient_is_taken():
    problem = Problem()
    leaves = problem.leaves()
    run(problem, leaves).sum().backward()
    problem.grad = torch.ones_like(problem.grad)
    assert torch.equal(leaves["x"].grad, problem.ours()["x"])


@pytest.mark.parametrize("name", NAMES)
def test_only_the_needed_gradient(name):
    problem = Problem()
    leaves = {key: t.requires_grad_(key == name) for key, t in problem.leaves().items()}
    run(problem, leaves).backward(problem.grad)
    assert [key for key, t in leaves.items() if t.grad is not None] == [name]
    assert torch.equal(leaves[name].grad, problem.ours()[name])


def test_inference_mode():
    problem = Problem()
    with torch.inference_mode():
        out = run(problem, problem.inputs)
    assert torch.equal(out, problem.ours()["out"])


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_compiles_without_graph_break(recompute):
    torch._dynamo.reset()
    problem = Problem()
    leaves, again = problem.leaves(), problem.leaves()
    expected = run(problem, leaves, recompute)
    expected.backward(problem.grad)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(problem, again, recompute)
    compiled.backward(problem.grad)
    assert torch.equal(compiled, expected)
    assert all(torch.equal(leaves[name].grad, again[name].grad) for name in NAMES)


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_saved_bytes_follow_the_formula(activation, recompute):
    problem = Problem((40, 0, 33, 35), activation, torch.bfloat16, bias=False)
    leaves, saved = problem.leaves(), {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(problem, leaves, recompute)
    x, w_in, w_out = (leaves[name] for name in NAMES[:3])
    rows, tables = problem.routing.token.numel(), problem.routing
    table_bytes = 4 * (3 * rows + tables.expert_offsets.numel() + tables.token_offsets.numel())
    parameters = 2 * (w_in.numel() + w_out.numel())  # saved by reference, no activation memory
    kept = 2 * rows * w_in.shape[1] if recompute == "none" else 0
    assert sum(saved.values()) == 2 * x.numel() + kept + table_bytes + parameters
