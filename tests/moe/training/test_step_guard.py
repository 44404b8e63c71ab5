import math

import torch
from torch import nn

from scatterfold.moe.training.step_guard import FirstNonFiniteOutput, StepGuard, first_non_finite_gradient


def test_steps_are_counted_in_all_and_in_a_row():
    assert StepGuard(limit=2, in_a_row=2).exhausted
    guard = StepGuard(limit=2, skipped=5)
    assert guard.allows(1.0, 1.0)
    assert not guard.allows(math.nan, 1.0)
    assert not guard.exhausted
    assert guard.allows(1.0, 1.0)
    assert not guard.allows(1.0, math.inf)
    assert not guard.exhausted
    assert not guard.allows(-math.inf, 0.0)
    assert guard.exhausted
    assert guard.skipped == 8


def test_the_first_bad_layer_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with FirstNonFiniteOutput([model]) as looked:
        model(torch.ones(1, 2))
    assert looked.name is None
    with torch.no_grad():
        model[1].weight[0, 0] = math.inf
    with FirstNonFiniteOutput([model]) as looked:
        model(torch.ones(1, 2))
    assert looked.name == "1"


def test_the_gradient_that_is_bad_first_in_the_backward_pass_is_named():
    assert first_non_finite_gradient({"a": math.nan, "b": math.inf, "c": 1.0}) == "b"
    assert first_non_finite_gradient({"a": 1.0}) is None
