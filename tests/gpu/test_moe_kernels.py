"""The Triton kernels on a device, in realistic shapes, against float64 on the rounded inputs."""

import pytest
import torch

from scatterfold.kernels import Routing, is_gated
from scatterfold.kernels.grouped_mm import grouped_mm
from scatterfold.kernels.reference import moe_mlp_reference
from scatterfold.kernels.scatter2scatter import scatter2scatter
from scatterfold.kernels.torch_backend import moe_mlp_torch

pytest.importorskip("triton")
DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Error in norm over the norm: at most six values between inputs and result are rounded to the dtype.
TOLERANCE = {torch.float32: 6 * 2**-22, torch.float16: 6 * 2**-11, torch.bfloat16: 6 * 2**-9}
# (T, D, F, E, K): few and many rows per expert, fine and coarse experts, widths that divide no tile.
SHAPES = [
    (4096, 2048, 768, 64, 8),
    (8192, 1024, 256, 128, 8),
    (4096, 1536, 4096, 8, 2),
    (1000, 1000, 200, 16, 4),
    (300, 77, 33, 5, 2),
    (64, 2048, 768, 128, 8),
    (1, 2048, 768, 128, 8),
]


@pytest.fixture
def kernels():
    from scatterfold.kernels import triton_backend

    return triton_backend


@pytest.fixture
def poisoned():
    """Fill whatever torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def route(tokens, experts, top_k, skew=0.0):
    """A top-k routing; `skew` > 0 prefers experts by Zipf's law."""
    preference = -skew * torch.arange(1, experts + 1, device=DEVICE).log()
    scores = preference - torch.empty(tokens, experts, device=DEVICE).exponential_().log()
    _, chosen = scores.topk(top_k, dim=1)
    return Routing.from_topk(chosen, torch.rand(tokens, top_k, device=DEVICE), experts)


def tensors(tokens, width, expert_width, experts, dtype, activation="swiglu"):
    hidden = 2 * expert_width if is_gated(activation) else expert_width

    def randn(*shape, scale=1.0):
        return (scale * torch.randn(*shape, device=DEVICE)).to(dtype)

    x, w_in = randn(tokens, width), randn(experts, hidden, width, scale=width**-0.5)
    return x, w_in, randn(experts, width, expert_width, scale=expert_width**-0.5), randn(tokens, width)


def run(function, x, w_in, w_out, grad, routing, activation="swiglu", dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, w_in, w_out)]
    weight_dtype = torch.promote_types(dtype or torch.float32, torch.float32)
    leaves.append(routing.weight.detach().to(weight_dtype).requires_grad_())
    out = function(*leaves[:3], routing.with_weight(leaves[3]), activation)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_close(results, expected, dtype):
    for result, reference in zip(results, expected, strict=True):
        assert not result.isnan().any()
        assert (result.double() - reference.double()).norm() <= TOLERANCE[dtype] * reference.double().norm()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(kernels, shape, dtype):
    tokens, width, expert_width, experts, top_k = shape
    inputs, routing = tensors(tokens, width, expert_width, experts, dtype), route(tokens, experts, top_k)
    expected = run(moe_mlp_reference, *inputs, routing, dtype=torch.float64)
    assert_close(run(kernels.moe_mlp_triton, *inputs, routing), expected, dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ["geglu", "reglu", "silu", "gelu", "relu", "relu2"])
def test_each_activation(kernels, activation):
    inputs, routing = tensors(2000, 512, 320, 8, torch.bfloat16, activation), route(2000, 8, 2)
    expected = run(moe_mlp_reference, *inputs, routing, activation, torch.float64)
    assert_close(run(kernels.moe_mlp_triton, *inputs, routing, activation), expected, torch.bfloat16)


@pytest.mark.parametrize("skew", [1.5, 40.0], ids=["Zipf", "one expert takes nearly all"])
def test_skewed_routing(kernels, skew):
    inputs, routing = tensors(4096, 768, 256, 64, torch.bfloat16), route(4096, 64, 4, skew)
    expected = run(moe_mlp_reference, *inputs, routing, dtype=torch.float64)
    assert_close(run(kernels.moe_mlp_triton, *inputs, routing), expected, torch.bfloat16)


def test_every_candidate_configuration(kernels):
    """Each one computes the same, so tuning changes speed and the last bits only."""
    from dataclasses import replace

    configs = kernels.configs
    inputs, routing = tensors(1024, 512, 384, 4, torch.bfloat16), route(1024, 4, 2)
    expected = run(moe_mlp_reference, *inputs, routing, dtype=torch.float64)
    for problem in configs.all_problems():
        if problem.dtype == torch.bfloat16:
            for config in configs.candidates(problem):
                for option in (config, replace(config, persistent=True), replace(config, tma=False)):
                    with configs.forced({problem.kernel: option}):
                        assert_close(run(kernels.moe_mlp_triton, *inputs, routing), expected, torch.bfloat16)


def test_repeats_are_equal_bit_for_bit(kernels):
    inputs, routing = tensors(8192, 1024, 512, 32, torch.bfloat16), route(8192, 32, 4)
    first = run(kernels.moe_mlp_triton, *inputs, routing)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(kernels.moe_mlp_triton, *inputs, routing)))


def test_no_host_synchronisation_and_graph_capture(kernels):
    x, w_in, w_out, grad = tensors(2048, 512, 256, 16, torch.bfloat16)
    routing = route(2048, 16, 2)
    run(kernels.moe_mlp_triton, x, w_in, w_out, grad, routing)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = run(kernels.moe_mlp_triton, x, w_in, w_out, grad, routing)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(kernels.moe_mlp_triton, x, w_in, w_out, grad, routing)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured))


def test_compiled_by_inductor_without_graph_break_or_recompilation(kernels):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    dynamic = torch.compile(kernels.moe_mlp_triton, fullgraph=True, dynamic=True, backend=counter)
    compiled = torch.compile(kernels.moe_mlp_triton, fullgraph=True)
    for tokens in (512, 700, 1300):
        inputs, routing = tensors(tokens, 512, 256, 16, torch.bfloat16), route(tokens, 16, 2)
        dynamic(*inputs[:3], routing, "swiglu")
        if tokens == 512:
            expected = run(kernels.moe_mlp_triton, *inputs, routing)
            assert all(torch.equal(a, b) for a, b in zip(expected, run(compiled, *inputs, routing)))
    assert counter.frame_count == 1


def test_more_than_two_to_the_31_elements(kernels):
    """The pre-activation is larger than a 32-bit index reaches: rows at its end must come out right."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB")
    tokens, width, expert_width, experts, top_k = 2**17, 128, 1088, 8, 8
    inputs, routing = tensors(tokens, width, expert_width, experts, torch.bfloat16), route(tokens, experts, top_k)
    assert routing.token.numel() * 2 * expert_width > 2**31
    out, dx, *_ = run(kernels.moe_mlp_triton, *inputs, routing)
    x, w_in, w_out, grad = inputs
    last = slice(tokens - 256, tokens)
    chosen = torch.ones(256, experts, device=DEVICE, dtype=torch.bool)
    token, expert = chosen.nonzero(as_tuple=True)
    weight = torch.empty(256, experts, device=DEVICE)
    expert_of = torch.repeat_interleave(routing.counts)
    ours = routing.token >= tokens - 256
    weight[routing.token[ours].long() - (tokens - 256), expert_of[ours]] = routing.weight[ours]
    part = Routing.from_assignments(token, expert, weight[token, expert], 256, experts)
    expected = run(moe_mlp_reference, x[last], w_in, w_out, grad[last], part, dtype=torch.float64)
    assert_close([out[last], dx[last]], expected[:2], torch.bfloat16)


def test_peak_memory_has_one_temporary_of_the_model_width(kernels):
    tokens, width, expert_width, experts, top_k = 8192, 4096, 256, 32, 8
    x, w_in, w_out, grad = tensors(tokens, width, expert_width, experts, torch.bfloat16)
    routing = route(tokens, experts, top_k)
    run(kernels.moe_mlp_triton, x, w_in, w_out, grad, routing)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    leaves = [t.requires_grad_() for t in (x, w_in, w_out)]
    out = kernels.moe_mlp_triton(*leaves, routing, "swiglu")
    rows = routing.token.numel()
    result, z, one_temporary = 2 * tokens * width, 4 * rows * expert_width, 2 * rows * width
    assert torch.cuda.max_memory_allocated() - before <= result + z + one_temporary + 2 * rows * expert_width + 2**22
    assert torch.cuda.memory_allocated() - before <= result + z + 2**21
    del out


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_routing_tables(kernels, dropped):
    from scatterfold.kernels.triton_backend.routing import routing_tables

    tokens, experts, top_k = 20000, 128, 8
    chosen = torch.rand(tokens, experts, device=DEVICE).topk(top_k, dim=1)[1]
    keep = torch.rand(tokens, top_k, device=DEVICE) >= dropped
    tables = routing_tables(chosen, experts, keep)
    position = torch.arange(tokens * top_k, device=DEVICE, dtype=torch.float64)
    token = torch.arange(tokens, device=DEVICE).repeat_interleave(top_k)
    expected = Routing.from_assignments(token, chosen.flatten(), position, tokens, experts, keep.flatten())
    names = ("token", "weight", "expert_offsets", "assignment", "token_offsets")
    for name, table in zip(names, tables):
        assert torch.equal(table, getattr(expected, name).to(table.dtype)), name


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_routing_tables_of_a_list(kernels, dropped, monkeypatch):
    tokens, experts = 20000, 128
    token, expert = (torch.rand(tokens, experts, device=DEVICE) < 0.06).nonzero(as_tuple=True)
    shuffle = torch.randperm(token.numel(), device=DEVICE)
    token, expert, weight = token[shuffle], expert[shuffle], torch.rand(token.numel(), device=DEVICE)
    keep = torch.rand(token.numel(), device=DEVICE) >= dropped
    made = []
    for forced in ("triton", "torch"):
        monkeypatch.setenv("SCATTERFOLD_BACKEND", forced)
        made.append(Routing.from_assignments(token, expert, weight, tokens, experts, keep))
    for name in ("token", "weight", "expert_offsets", "assignment", "token_offsets"):
        assert torch.equal(*(getattr(routing, name) for routing in made)), name


def test_grouped_mm_and_scatter2scatter(kernels):
    x, w_in, _, _ = tensors(4096, 512, 256, 16, torch.bfloat16)
    routing = route(4096, 16, 4)
    token = routing.token.long()
    expert = torch.repeat_interleave(routing.counts)
    expected = torch.stack(
        [w_in.double()[e] @ x.double()[t] for t, e in zip(token[::97].tolist(), expert[::97].tolist())]
    )
    grouped = grouped_mm(x[token], w_in, routing.expert_offsets)
    gathered = scatter2scatter(x, w_in, routing, "token", "expert")
    assert torch.equal(grouped, gathered)
    assert_close([grouped[::97]], [expected], torch.bfloat16)


def test_the_torch_backend_agrees():
    inputs, routing = tensors(4096, 1024, 512, 16, torch.bfloat16), route(4096, 16, 4)
    expected = run(moe_mlp_reference, *inputs, routing, dtype=torch.float64)
    assert_close(run(moe_mlp_torch, *inputs, routing), expected, torch.bfloat16)


def test_tuning_writes_a_cache_that_is_used(kernels, tmp_path, monkeypatch):
    configs = kernels.configs
    monkeypatch.setenv("SCATTERFOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("SCATTERFOLD_AUTOTUNE", "1")
    configs._tuned.cache_clear()
    inputs, routing = tensors(2048, 512, 256, 8, torch.bfloat16), route(2048, 8, 2)
    expected = run(moe_mlp_reference, *inputs, routing, dtype=torch.float64)
    assert_close(run(kernels.moe_mlp_triton, *inputs, routing), expected, torch.bfloat16)
    tuned = configs.read_cache(configs.cache_file(torch.device("cuda", 0)))
    assert {key.split("/")[0] for key in tuned} == {"up", "rows", "rows_k", "dact", "weight_grad"}
    configs._tuned.cache_clear()


def test_the_self_check_passes(kernels):
    from scatterfold.kernels.triton_backend.self_check import self_check

    for dtype in TOLERANCE:
        checks = self_check(torch.device(DEVICE), dtype)
        assert all(check.passed for check in checks), checks
