"""A whole MoE layer is one graph to torch.compile, unless a checkpoint records its decisions."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from scatterfold.moe import Experts, MoELayer, ThresholdRouter, TopKRouter
from scatterfold.moe.recompute import checkpointed

D, E, F = 8, 4, 6
LOSSES = {"balance_micro_batch": 0.1, "balance_sequence": 0.1, "balance_global_batch": 0.1, "z_loss": 0.1}
ROUTERS = {
    "top_k": lambda: TopKRouter(D, E, 2, bias_rate=0.01, capacity_factor=1.0, **LOSSES),
    "threshold": lambda: ThresholdRouter(D, E, 0.7),
}


def results(layer, run, tokens):
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(tokens)).requires_grad_()
    layer.zero_grad()
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def make(router):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return MoELayer(ROUTERS[router](), Experts(E, D, F, bias=True))


@pytest.mark.parametrize("router", ROUTERS)
def test_one_graph_for_any_number_of_tokens(router):
    layer, counter = make(router), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (7, 12, 5):
        for ours, expected in zip(results(layer, compiled, tokens), results(layer, layer, tokens), strict=True):
            torch.testing.assert_close(ours, expected)
    assert counter.frame_count <= 2  # the first number of tokens, then any


def test_what_was_traced_without_a_checkpoint_replays_decisions_in_one():
    """The router's weights change their sign before the backward pass: other experts would be chosen again."""
    layer = make("top_k")
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(12, D)
    compiled(x)
    grads = []
    for run in (compiled, layer):
        own = x.clone().requires_grad_()
        out = checkpointed(run, own)
        layer.router.weight.data.neg_()  # .data: autograd does not notice
        out.square().sum().backward()
        layer.router.weight.data.neg_()
        grads.append(own.grad)
    torch.testing.assert_close(*grads)
