"""`moe_mlp_cpu` against a float64 loop over tokens and experts."""

import pytest
import torch

from scatterfold.kernels import ACTIVATIONS
from scatterfold.kernels.cpu import moe_mlp_cpu
from scatterfold.kernels.cpu.chunks import split
from scatterfold.tests.kernels.expert_problem import NAMES, TOLERANCE, ExpertProblem, check, run

# Rows of each expert: few and alike, so they are batched; with gaps; long and short; above what one slot rounds to.
COUNTS = {
    "alike": (5, 4, 6, 5, 5),
    "gaps": (0, 3, 0, 0, 7, 2, 0),
    "uneven": (1, 70, 2, 0, 33, 41),
    "long": (150, 131, 140),
    "one": (0, 0, 90, 0),
}


class Problem(ExpertProblem):
    """Given rows per expert, and a token without any."""

    function = staticmethod(moe_mlp_cpu)

    def __init__(self, counts=(5, 0, 4, 6), activation="swiglu", dtype=torch.float32, bias=True, padding=5, **widths):
        generator = torch.Generator().manual_seed(0)
        tokens = max(counts) + 3
        chosen = [torch.randperm(tokens - 1, generator=generator)[:count] for count in counts]  # never the last token
        expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        pairs = torch.cat(chosen), expert
        super().__init__(pairs, tokens, len(counts), generator, activation, dtype, bias, padding, **widths)


@pytest.mark.parametrize("padding", [0, 5, 40])  # of routing: where the last expert's slot does and does not fit
@pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_each_dtype_and_layout(dtype, counts, padding):
    check(Problem(counts, dtype=dtype, padding=padding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute_in_each_layout(dtype):
    for counts in COUNTS.values():
        check(Problem(counts, dtype=dtype), recompute="all")


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
        return run(problem, dict(zip(NAMES, tensors)), recompute=recompute)

    assert torch.autograd.gradcheck(function, tuple(problem.leaves().values()), fast_mode=True)


def test_padding_gets_zero_gradient():
    problem = Problem()
    assert not problem.ours()["weight"][problem.count :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
def test_repeats_are_equal_bit_for_bit(counts, dtype):
    problem = Problem(counts, dtype=dtype)
    first, second = problem.ours(), problem.ours()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recomputing_gives_the_same_bits():
    for counts in COUNTS.values():
        problem = Problem(counts)
        kept, again = problem.ours(recompute="none"), problem.ours(recompute="all")
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


def test_inference_mode():
    problem = Problem()
    with torch.inference_mode():
        out = run(problem, problem.inputs)
    assert torch.equal(out, problem.ours()["out"])


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_saved_bytes_follow_the_formula(activation, recompute):
    problem = Problem((40, 0, 33, 35), activation, torch.bfloat16, bias=False)
    leaves, saved = problem.leaves(), {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(problem, leaves, recompute=recompute)
    x, w_in, w_out = (leaves[name] for name in NAMES[:3])
    rows, tables = problem.routing.token.numel(), problem.routing
    table_bytes = 4 * (3 * rows + tables.expert_offsets.numel() + tables.token_offsets.numel())
    parameters = 2 * (w_in.numel() + w_out.numel())  # saved by reference, no activation memory
    kept = 2 * rows * w_in.shape[1] if recompute == "none" else 0
    assert sum(saved.values()) == 2 * x.numel() + kept + table_bytes + parameters
