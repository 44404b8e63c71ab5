import torch

from scatterfold.moe.recompute import checkpointed, recomputing, remember


def test_a_decision_is_taken_once_and_side_effects_can_stay_away():
    calls, effects = [], []

    def decide():
        calls.append(len(calls))
        return torch.tensor(float(len(calls)))

    def f(x):
        factor = remember(decide)
        if not recomputing():
            effects.append(1)
        return (x * factor).sin()

    x = torch.randn(3, requires_grad=True)
    first, second = checkpointed(f, x), checkpointed(f, x)
    (first.sum() + second.sum()).backward()
    assert calls == [0, 1]
    assert len(effects) == 2
    torch.testing.assert_close(x.grad, x.detach().cos() + 2 * (2 * x.detach()).cos())


def test_without_checkpointing_a_decision_is_simply_taken():
    assert remember(lambda: 5) == 5
    assert not recomputing()
