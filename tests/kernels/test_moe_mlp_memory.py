"""What `moe_mlp` keeps for its backward pass, to the byte, and what it holds on the way.

Run by Triton's interpreter too, where it is about the Triton kernels.
"""

import sys

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from scatterfold.kernels import Routing, is_gated, moe_mlp
from scatterfold.kernels.availability import interprets

moe_mlp_module = sys.modules["scatterfold.kernels.moe_mlp"]  # the package's attribute of this name is the function
BACKENDS = ["triton"] if interprets() else ["cpu", "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if interprets() else [torch.float64])


def problem(tokens, width, expert_width, experts, activation, dtype, bias, top_k=3):
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * expert_width if is_gated(activation) else expert_width

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    x, w_in, w_out = randn(tokens, width), randn(experts, hidden, width), randn(experts, width, expert_width)
    b_in, b_out = (randn(experts, hidden), randn(experts, width)) if bias else (None, None)
    chosen = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=generator).requires_grad_()
    return x, w_in, w_out, b_in, b_out, Routing.from_topk(chosen, weights, experts)


@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_bytes_follow_the_formula(backend, dtype, recompute, activation, bias):
    tokens, width, expert_width, experts, top_k = 23, 16, 8, 5, 3
    x, w_in, w_out, b_in, b_out, routing = problem(tokens, width, expert_width, experts, activation, dtype, bias, top_k)
    saved = {}

    def pack(tensor):
        if tensor.numel():
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_mlp(x, w_in, w_out, routing, activation, backend, b_in=b_in, b_out=b_out, recompute=recompute)
    for parameter in (w_in, w_out, b_in, b_out):  # by reference: no memory of the activations
        if parameter is not None:
            assert saved.pop(parameter.data_ptr()) == parameter.numel() * dtype.itemsize
    assignments, hidden = tokens * top_k, w_in.shape[1]
    kept = dtype.itemsize * (tokens * width + (assignments * hidden if recompute == "none" else 0))
    tables = 4 * (3 * assignments + (tokens + 1) + (experts + 1))  # token, weight, assignment; both offsets
    assert sum(saved.values()) == kept + tables


def most_at_once(run, size):
    """How many blocks of at least `size` bytes `run()` had allocated at a time, within operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    pending, changes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.typed[0] == _EventType.Allocation and abs(event.typed[1].alloc_size) >= size:
            changes.append((event.start_time_ns, 1 if event.typed[1].alloc_size > 0 else -1))
    live = most = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        live += change
        most = max(most, live)
    return most


def test_the_measure_counts_what_lives_together():
    def run():
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = torch.empty_like(b)
        torch.zeros(999)
        torch.add(b, c.double(), out=c)  # casts on the way: a third and a fourth block

    assert most_at_once(run, 4000) >= 3 and most_at_once(run, 8001) == 0
    assert most_at_once(lambda: [torch.zeros(1000), torch.zeros(1000)], 4000) == 2
    assert most_at_once(lambda: [torch.zeros(1000).sum(), torch.zeros(1000).sum()], 4000) == 1


@pytest.fixture
def without_launches(monkeypatch):
    """The host code of the Triton backend, which allocates everything, on CPU tensors that no kernel fills."""
    launch = pytest.importorskip("scatterfold.kernels.triton_backend.launch")
    monkeypatch.setattr(launch, "launch", lambda *args, **options: None)
    monkeypatch.setattr(moe_mlp_module, "check_serves", lambda *args: None)


@pytest.mark.skipif(interprets(), reason="the interpreter has memory of its own")
@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_one_temporary_of_all_rows_at_a_time(backend, dtype, recompute, bias, request):
    """Forward and backward hold at most one block as large as the outputs of all experts before they are summed."""
    if backend == "triton":
        request.getfixturevalue("without_launches")
    tokens, width, experts, top_k = 256, 128, 4, 4
    *inputs, routing = problem(tokens, width, 8, experts, "swiglu", dtype, bias, top_k)
    x, w_in, w_out, b_in, b_out = inputs
    size = tokens * top_k * width * dtype.itemsize
    assert all(t is None or t.numel() * t.element_size() < size for t in inputs)

    def run():
        own = routing.with_weight(routing.weight.detach().requires_grad_())
        out = moe_mlp(x, w_in, w_out, own, "swiglu", backend, b_in=b_in, b_out=b_out, recompute=recompute)
        out.backward(torch.ones_like(out))

    run()  # loads what is loaded once
    assert most_at_once(run, size) <= 1  # the CPU path takes none in full precision
