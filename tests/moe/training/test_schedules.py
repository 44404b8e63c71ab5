import math

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.moe.training.schedules import WSD, Constant, Cosine, Linear


@pytest.mark.parametrize("schedule", [Constant(10), Linear(10), Cosine(10), WSD(10)])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    factors = [schedule(step, 100) for step in range(11)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1.0
    steps = [b - a for a, b in zip(factors, factors[1:])]
    assert all(step == pytest.approx(steps[0]) for step in steps)


def test_each_shape_at_its_quarter_points():
    assert [Linear(min_ratio=0.1)(s, 100) for s in (0, 50, 100)] == pytest.approx([1.0, 0.55, 0.1])
    assert [Cosine(min_ratio=0.1)(s, 100) for s in (0, 25, 50, 100)] == pytest.approx(
        [1.0, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)), 0.55, 0.1]
    )
    assert [WSD(decay_ratio=0.5)(s, 100) for s in (0, 50, 75, 100)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert [Constant()(s, 100) for s in (0, 99, 1000)] == [1.0, 1.0, 1.0]


def test_a_schedule_never_rises_after_warm_up_and_stays_at_its_floor():
    for schedule in (Linear(5, 0.2), Cosine(5, 0.2), WSD(5, 0.2)):
        factors = [schedule(step, 50) for step in range(5, 80)]
        assert all(b <= a for a, b in zip(factors, factors[1:]))
        assert factors[-1] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(-1), "schedule.warmup_steps=-1 is negative"),
        (lambda: Linear(0, 1.5), "schedule.min_ratio=1.5 is out of range"),
        (lambda: WSD(0, 0.0, 0.0), "schedule.decay_ratio=0.0 is out of range"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
