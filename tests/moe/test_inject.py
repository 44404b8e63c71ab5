import torch

from scatterfold.moe.inject import inject_gradient
from scatterfold.moe.recompute import checkpointed


def test_the_value_is_unchanged_and_the_gradient_is_that_of_the_sum():
    for wrap in (lambda f, *a: f(*a), checkpointed):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        y = torch.tensor([3.0, 5.0], requires_grad=True)

        def f(x, y):
            return inject_gradient(x * y, (y**2).sum() * x[0], 0.25)

        out = wrap(f, x, y)
        assert torch.equal(out, x * y)
        (7 * out.sum()).backward()
        x2, y2 = x.detach().requires_grad_(), y.detach().requires_grad_()
        (7 * (x2 * y2).sum() + 0.25 * (y2**2).sum() * x2[0]).backward()
        torch.testing.assert_close(x.grad, x2.grad)
        torch.testing.assert_close(y.grad, y2.grad)
