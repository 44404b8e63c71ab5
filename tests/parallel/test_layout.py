"""Layouts that fit their world, and one line for those that do not."""

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.parallel import Layout


@pytest.mark.parametrize(
    ("layout", "world", "expected"),
    [
        (Layout(), 1, (1, 1)),
        (Layout(), 6, (6, 1)),
        (Layout(dp_shard=3), 6, (2, 3)),
        (Layout(dp_shard=6), 6, (1, 6)),
        (Layout(2, 4), 8, (2, 4)),
    ],
)
def test_resolve(layout, world, expected):
    resolved = layout.resolve(world)
    assert (resolved.dp_replicate, resolved.dp_shard, resolved.world) == (*expected, world)


@pytest.mark.parametrize(
    ("layout", "world", "message"),
    [
        (Layout(dp_shard=4), 6, "layout.dp_shard=4 does not divide the 6 ranks of this run, allowed: 1, 2, 3, 6"),
        (Layout(dp_shard=2), 1, "layout.dp_shard=2 does not divide the 1 rank of this run, allowed: 1"),
        (
            Layout(2, 3),
            4,
            "layout.dp_replicate=2 x layout.dp_shard=3 = 6, but this run has 4 ranks, "
            "allowed: sizes whose product is 4",
        ),
    ],
)
def test_impossible_for_the_world(layout, world, message):
    with pytest.raises(ConfigError) as caught:
        layout.resolve(world)
    assert str(caught.value) == message


@pytest.mark.parametrize("sizes", [{"dp_shard": 0}, {"dp_replicate": 0}, {"dp_shard": -1}])
def test_sizes_below_one(sizes):
    (name, size), *_ = sizes.items()
    with pytest.raises(ConfigError, match=f"layout.{name}={size} is too small, allowed: 1 or more"):
        Layout(**sizes)
