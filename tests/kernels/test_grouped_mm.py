"""`grouped_mm` against a float64 loop over experts. Also run on Triton's interpreter by triton/test_interpreter.py."""

import os

import pytest
import torch

from scatterfold.kernels.errors import ConfigError
from scatterfold.kernels.grouped_mm import grouped_mm

# Error in norm over the norm: one rounding of the result to the dtype (the interpreter cuts bfloat16 off: 2^-8).
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2**-21, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16] if INTERPRETED else list(TOLERANCE)


def problem(dtype, rows=(5, 0, 20, 1), padding=0, width=24, outputs=18, seed=0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    x = torch.randn(sum(rows) + padding, width, generator=generator).to(dtype)
    x[sum(rows) :] = float("nan")
    w = torch.randn(len(rows), outputs, width, generator=generator).to(dtype)
    grad = torch.randn(len(x), outputs, generator=generator).to(dtype)
    return x.requires_grad_(), w.requires_grad_(), offsets, grad


def loop(x, w, offsets, grad):
    """Output and gradients in float64."""
    x, w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    y = torch.zeros(len(x), w.shape[1], dtype=torch.float64)
    for expert in range(len(w)):
        for row in range(int(offsets[expert]), int(offsets[expert + 1])):
            y[row] = w[expert] @ x[row]
    if not y.requires_grad:  # no rows at all
        return y, torch.zeros_like(x), torch.zeros_like(w)
    y.backward(grad.double())
    return y.detach(), x.grad, w.grad


def assert_close(result, expected, dtype):
    assert (result.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients_equal_the_loop(dtype):
    x, w, offsets, grad = problem(dtype)
    expected = loop(x, w, offsets, grad)
    y = grouped_mm(x, w, offsets)
    y.backward(grad)
    for result, reference in zip((y, x.grad, w.grad), expected):
        assert_close(result, reference, dtype)


def test_padding_gives_zeros_and_takes_no_gradient():
    x, w, offsets, grad = problem(torch.float32, padding=7)
    y = grouped_mm(x, w, offsets)
    y.backward(grad)
    assert not y[-7:].any() and not x.grad[-7:].any()
    assert not w.grad.isnan().any()


def test_transposed_weights_need_no_copy():
    x, w, offsets, grad = problem(torch.float32)
    stored = w.detach().transpose(1, 2).contiguous()
    assert_close(grouped_mm(x, stored.transpose(1, 2), offsets), loop(x, w, offsets, grad)[0], torch.float32)


@pytest.mark.parametrize("rows", [(0, 0), (3,)])
def test_no_rows_and_one_expert(rows):
    x, w, offsets, grad = problem(torch.float32, rows=rows)
    y = grouped_mm(x, w, offsets)
    y.backward(grad)
    expected = loop(x, w, offsets, grad)
    for result, reference in zip((y, x.grad, w.grad), expected):
        assert_close(result, reference, torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="float64 takes no Triton kernel")
def test_gradcheck():
    x, w, offsets, _ = problem(torch.float64, rows=(2, 0, 3), width=3, outputs=2)
    assert torch.autograd.gradcheck(lambda x, w: grouped_mm(x, w, offsets), (x, w))


def test_compiles_without_graph_break():
    x, w, offsets, grad = problem(torch.float32)
    compiled = torch.compile(lambda x, w: 2 * grouped_mm(x + 1, w, offsets), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w), 2 * grouped_mm(x + 1, w, offsets))


@pytest.mark.parametrize(
    ("x", "w", "offsets", "message"),
    [
        (torch.ones(3, 4), torch.ones(2, 5, 6), torch.zeros(3, dtype=torch.int32), "x has shape"),
        (torch.ones(3, 4), torch.ones(2, 5, 4).half(), torch.zeros(3, dtype=torch.int32), "same dtype"),
        (torch.ones(3, 4), torch.ones(2, 5, 4), torch.zeros(2, dtype=torch.int32), "offsets is"),
        (torch.ones(3, 4), torch.ones(2, 5, 4), torch.zeros(3), "offsets is"),
    ],
)
def test_what_does_not_fit_is_named(x, w, offsets, message):
    with pytest.raises(ConfigError, match=message):
        grouped_mm(x, w, offsets)
