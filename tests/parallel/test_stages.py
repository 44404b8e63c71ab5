"""Splits of layers against trying all of them, and what schedules refuse."""

import itertools
import random

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.parallel import Layout
from scatterfold.parallel.engines import Job, TorchEngine
from scatterfold.parallel.pipeline.stages import PipelineSchedule, split_layers


def all_splits(layers, stages):
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield [range(start, stop) for start, stop in zip((0, *cuts), (*cuts, layers))]


def quality(split, costs, first, last):
    """The largest cost of a stage, then the sum of squares."""
    each = [sum(costs[layer] for layer in stage) for stage in split]
    each[0] += first
    each[-1] += last
    return max(each), sum(cost * cost for cost in each)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
def test_no_split_is_better(stages):
    rng = random.Random(stages)
    for _ in range(20):
        costs = [rng.choice([1.0, 2.0, 3.5]) for _ in range(8)]
        first, last = rng.choice([0.0, 1.0]), rng.choice([0.0, 4.0])
        found = split_layers(costs, stages, first, last)
        assert [layer for stage in found for layer in stage] == list(range(8))
        best = min(quality(split, costs, first, last) for split in all_splits(8, stages))
        assert quality(found, costs, first, last) == pytest.approx(best)


def test_splits_one_can_check_by_hand():
    assert split_layers([1.0] * 8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert split_layers([1.0] * 5, 2) == [range(0, 2), range(2, 5)]  # a short front: more is in flight there
    assert split_layers([1.0] * 8, 2, last=4.0) == [range(0, 6), range(6, 8)]
    assert split_layers([1.0] * 8, 2, first=2.0, last=2.0) == [range(0, 4), range(4, 8)]
    assert split_layers([3.0, 1.0, 1.0, 1.0], 2) == [range(0, 1), range(1, 4)]


def test_more_stages_than_layers():
    with pytest.raises(ConfigError, match=r"layout.pp x engine.virtual_stages = 6 stages for model.layers=5"):
        split_layers([1.0] * 5, 6)


def test_parts_are_dealt_out():
    looped, v = PipelineSchedule("interleaved", 3), PipelineSchedule("zero_bubble_v")
    assert [looped.stages_of(rank, 2) for rank in range(2)] == [(0, 2, 4), (1, 3, 5)]
    assert [v.stages_of(rank, 4) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert looped.stages(1) == 1  # a pipeline of one rank is none
    assert looped.stages_of(0, 1) == (0,)


@pytest.mark.parametrize(
    ("name", "virtual", "message"),
    [
        ("dualpipe", None, "engine.pipeline_schedule='dualpipe' is unknown, allowed: 1f1b, gpipe"),
        ("1f1b", 2, "engine.virtual_stages=2 with engine.pipeline_schedule=1f1b, allowed: 1$"),
        ("interleaved", 1, "engine.virtual_stages=1 with engine.pipeline_schedule=interleaved, allowed: 2 or more"),
        ("zero_bubble", 0, "engine.virtual_stages=0 with engine.pipeline_schedule=zero_bubble, allowed: 1 or more"),
        ("zero_bubble_v", 3, "engine.virtual_stages=3 with engine.pipeline_schedule=zero_bubble_v, allowed: 2$"),
    ],
)
def test_schedules_that_do_not_exist(name, virtual, message):
    with pytest.raises(ConfigError, match=message):
        PipelineSchedule(name, virtual)


@pytest.mark.parametrize(
    ("name", "micro_batches", "options", "message"),
    [
        ("1f1b", 1, {}, "over layout.pp=4 with 1 micro-batch a step"),
        ("interleaved", 6, {}, "over layout.pp=4 with 6 micro-batches a step .*, allowed: a multiple of 4"),
        ("zero_bubble", 2, {}, "2 micro-batches a step .* allowed: a multiple of 4"),
        ("1f1b", 3, {}, "3 micro-batches a step .* allowed: 4 or more, or engine.pipeline_schedule=gpipe"),
        ("zero_bubble_v", 3, {}, "3 micro-batches a step .* allowed: 4 or more"),
        ("zero_bubble", 4, {"checkpointing": "full"}, "trainer.activation_checkpointing=full with .*=zero_bubble"),
        ("zero_bubble_v", 4, {"compiled": True}, "trainer.compile=true with engine.pipeline_schedule=zero_bubble_v"),
    ],
)
def test_steps_that_a_schedule_cannot_run(name, micro_batches, options, message):
    schedule = PipelineSchedule(name)
    with pytest.raises(ConfigError, match=message) as caught:
        schedule.check(4, micro_batches, **options)
    assert "\n" not in str(caught.value)
    schedule.check(1, micro_batches, **options)


def test_steps_that_a_schedule_can_run():
    PipelineSchedule("gpipe").check(4, 1, "full", True)
    PipelineSchedule("1f1b").check(4, 5, "full", True)
    PipelineSchedule("interleaved").check(4, 8, "selective")
    PipelineSchedule("zero_bubble_v").check(4, 7)


def test_a_pipeline_reduces_gradients_once_a_step():
    engine = TorchEngine(reduce_every_micro_batch=True)
    engine.check(Layout(dp_shard=2).resolve(2), Job(micro_batches=4))
    with pytest.raises(ConfigError, match="engine.reduce_every_micro_batch=true with layout.pp=2, .* allowed: false"):
        engine.check(Layout(pp=2).resolve(2), Job(micro_batches=4))
