import pytest
import torch
import torch.nn.functional as F

from scatterfold.kernels.cross_entropy import linear_cross_entropy


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(13, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 11, (13,))
    labels[[2, 7, 12]] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_elements", [1, 11, 40, 10_000])
def test_equals_the_cross_entropy_of_all_logits(chunk_elements):
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_elements)
    reference = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(loss, reference)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(3 * reference, (hidden, weight))):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    hidden, weight, labels = problem(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 30), (hidden, weight))


def test_only_what_is_asked_for_gets_a_gradient():
    hidden, weight, labels = problem()
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_nothing_to_predict_is_zero_and_moves_nothing():
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()
    assert linear_cross_entropy(hidden[:0], weight, labels[:0]) == 0


def test_under_autocast_products_run_in_half_precision_and_the_loss_in_float32():
    hidden, weight, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, 40)
    loss.backward()
    assert loss.dtype == torch.float32 and weight.grad.dtype == torch.float32
    reference = F.cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).float(), labels, reduction="sum")
    torch.testing.assert_close(loss, reference)
