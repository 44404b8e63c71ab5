import pytest
import torch
import torch.nn.functional as F

from scatterfold.kernels.rms_norm import rms_norm


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 4, 6)])
def test_value_and_gradients_are_those_of_torch(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True)
    grad = torch.randn(shape)
    out, reference = rms_norm(x, weight, 1e-5), F.rms_norm(x, weight.shape, weight, 1e-5)
    torch.testing.assert_close(out, reference)
    got = torch.autograd.grad(out, (x, weight), grad)
    for a, b in zip(got, torch.autograd.grad(reference, (x, weight), grad)):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))


def test_bfloat16_is_computed_in_float32_and_saves_no_copy():
    torch.manual_seed(0)
    x = torch.randn(4, 64).bfloat16().requires_grad_()
    weight = torch.randn(64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = rms_norm(x, weight, 1e-5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, rms_norm(x.float(), weight, 1e-5).bfloat16())
    assert sum(t.numel() for t in saved if t.dtype == torch.float32) == 64 + 4
