"""A split backward pass computes each gradient once, where torch alone would compute all of them twice."""

import pytest
import torch

from scatterfold.kernels import Routing, grouped_mm, moe_mlp
from scatterfold.kernels.needed import needed_gradients


class Record(torch.autograd.Function):
    seen = []

    @staticmethod
    def forward(ctx, x, text, weight, constant):
        return x * weight * constant

    @staticmethod
    def backward(ctx, grad):
        Record.seen.append(needed_gradients(ctx, 4))
        return grad, None, grad, None


@pytest.mark.parametrize("leaf", [True, False])
def test_tells_the_halves_of_a_backward_pass_apart(leaf):
    x, weight = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    inputs = (x, weight) if leaf else (x.exp(), weight.exp())
    Record.seen.clear()
    out = Record.apply(inputs[0], "text", inputs[1], torch.ones(3)).sum()
    torch.autograd.grad(out, x, retain_graph=True)
    torch.autograd.grad(out, weight, retain_graph=True)
    torch.autograd.grad(out, [x, weight], retain_graph=True)
    out.backward()
    whole = [True, False, True, False]
    assert Record.seen == [[True, False, False, False], [False, False, True, False], whole, whole]


def test_frozen_inputs_are_not_needed():
    Record.seen.clear()
    Record.apply(torch.ones(3), "text", torch.ones(3, requires_grad=True), torch.ones(3)).sum().backward()
    assert Record.seen == [[False, False, True, False]]


def run_moe(x, w_in, w_out):
    expert = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1]])
    return moe_mlp(x, w_in, w_out, Routing.from_topk(expert, torch.full((4, 2), 0.5), 3), backend="cpu")


def run_grouped(x, w_in, w_out):
    return grouped_mm(x, w_in, torch.tensor([0, 1, 3, 4], dtype=torch.int32))


@pytest.mark.parametrize("run", [run_moe, run_grouped])
def test_halves_give_what_the_whole_gives(run):
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 6), (3, 10, 6), (3, 6, 5)
    x, w_in, w_out = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    weights = [w_in] if run is run_grouped else [w_in, w_out]
    whole = torch.autograd.grad(run(x, w_in, w_out).square().sum(), [x, *weights])
    loss = run(x, w_in, w_out).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close([*first, *torch.autograd.grad(loss, weights)], [*whole], rtol=0, atol=0)


@pytest.mark.parametrize("half", ["inputs", "weights"])
def test_experts_skip_the_other_half(half, monkeypatch):
    asked = []
    from scatterfold.kernels import fused_operator

    monkeypatch.setattr(
        fused_operator, "needed_gradients", lambda ctx, count: asked.append(needed_gradients(ctx, count)) or asked[-1]
    )
    x, w_in, w_out = (torch.ones(shape, requires_grad=True) for shape in ((4, 6), (3, 10, 6), (3, 6, 5)))
    loss = run_moe(x, w_in, w_out).sum()
    torch.autograd.grad(loss, [x] if half == "inputs" else [w_in, w_out])
    assert asked == [[half == "inputs", half == "weights", half == "weights", False, False, False]]
