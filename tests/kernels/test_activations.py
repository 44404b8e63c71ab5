"""Activations against scalar formulas, and the buffered variants against autograd."""

import math

import pytest
import torch

from scatterfold.kernels import ACTIVATIONS, ConfigError, activate, is_gated
from scatterfold.kernels.activations import activate_backward_out, activate_out

SCALAR = {
    "silu": lambda z: z / (1 + math.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))),
    "relu": lambda z: max(z, 0.0),
    "relu2": lambda z: max(z, 0.0) ** 2,
    "clamped": lambda z: min(z, 7.0) / (1 + math.exp(-1.702 * min(z, 7.0))),
}
BASE = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "clamped_swiglu": "clamped"}


def pre_activation(name, rows=7, width=5, dtype=torch.float64):
    torch.manual_seed(0)
    h = torch.randn(rows, 2 * width if is_gated(name) else width, dtype=dtype)
    return 6 * h if name == "clamped_swiglu" else h  # some beyond its limits


def factor(name, up):
    return min(max(up, -7.0), 7.0) + 1 if name == "clamped_swiglu" else up


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values(name):
    h = pre_activation(name)
    act = SCALAR[BASE.get(name, name)]
    width = 5
    for row, result in zip(h.tolist(), activate(name, h).tolist()):
        expected = [act(row[f]) * (factor(name, row[width + f]) if is_gated(name) else 1.0) for f in range(width)]
        assert result == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_by_finite_differences(name):
    assert torch.autograd.gradcheck(lambda h: activate(name, h), pre_activation(name).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_buffered_forward_and_backward_equal_autograd(name, dtype):
    h = pre_activation(name, dtype=dtype).requires_grad_()
    expected = activate(name, h)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, h, grad)
    out, grad_h = torch.full_like(expected, torch.nan), torch.full_like(h, torch.nan)
    with torch.no_grad():
        activate_out(name, h, out, inner=grad_h[:, -5:])
        activate_backward_out(name, h, grad.clone(), grad_h)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_h, expected_grad, rtol=tolerance, atol=tolerance)


def test_the_clamp_is_reached_on_every_side():
    gate, up = pre_activation("clamped_swiglu").chunk(2, dim=-1)
    assert (gate > 7).any() and (gate < -7).any() and (up > 7).any() and (up < -7).any() and (up.abs() < 7).any()


def test_unknown_name():
    with pytest.raises(ConfigError, match="^activation='swish' is unknown, allowed: swiglu, geglu"):
        activate("swish", torch.zeros(1, 2))
