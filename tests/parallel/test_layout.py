"""Layouts that fit their world, where each rank stands in them, and one line for those that do not fit."""

from itertools import product

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.parallel import Layout

FIELDS = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp")


@pytest.mark.parametrize(
    ("layout", "world", "expected"),
    [
        (Layout(), 1, (1, 1)),
        (Layout(), 6, (6, 1)),
        (Layout(dp_shard=3), 6, (2, 3)),
        (Layout(dp_shard=6), 6, (1, 6)),
        (Layout(2, 4), 8, (2, 4)),
        (Layout(tp=2, cp=2, pp=2), 16, (2, 1)),
        (Layout(1, 2, cp=2, tp=2, pp=2, ep=4, etp=2), 16, (1, 2)),
    ],
)
def test_resolve(layout, world, expected):
    resolved = layout.resolve(world)
    assert (resolved.dp_replicate, resolved.dp_shard, resolved.world) == (*expected, world)
    assert all(getattr(resolved, name) == getattr(layout, name) for name in FIELDS[1:])


@pytest.mark.parametrize(
    ("sizes", "world", "edp", "replicate", "shard"),
    [
        ({}, 4, 4, 4, 1),
        ({"ep": 2}, 4, 2, 2, 1),  # nothing is cut, so experts have copies
        ({"dp_shard": 4}, 4, 4, 1, 4),
        ({"dp_shard": 4, "ep": 2}, 4, 2, 1, 2),
        ({"dp_shard": 4, "ep": 4}, 4, 1, 1, 1),
        ({"dp_shard": 2, "ep": 2}, 4, 2, 2, 1),
        ({"dp_shard": 2, "ep": 4}, 8, 2, 2, 1),  # ep spans two copies of the model
        ({"dp_shard": 4, "ep": 2, "etp": 2}, 8, 2, 2, 1),
        ({"dp_shard": 8, "ep": 2, "etp": 2}, 8, 2, 1, 2),
        ({"dp_shard": 2, "tp": 2, "ep": 2}, 8, 4, 2, 2),  # ep folded over tp
        ({"dp_shard": 2, "cp": 2, "ep": 4}, 4, 1, 1, 1),  # ep folded over data and cp
        ({"pp": 2, "dp_shard": 2, "ep": 2}, 8, 2, 2, 1),
    ],
)
def test_copies_and_cuts_of_experts(sizes, world, edp, replicate, shard):
    layout = Layout(**sizes).resolve(world)
    assert (layout.edp, layout.edp_replicate, layout.edp_shard) == (edp, replicate, shard)


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
        (
            Layout(tp=4, pp=3),
            8,
            "layout.tp=4 x layout.pp=3 = 12 does not divide the 8 ranks of this run, allowed: products of 1, 2, 4, 8",
        ),
        (
            Layout(1, tp=2, pp=2),
            8,
            "layout.dp_replicate=1 x layout.dp_shard=1 x layout.tp=2 x layout.pp=2 = 4, but this run has 8 ranks, "
            "allowed: sizes whose product is 8",
        ),
        (Layout(ep=3), 4, "layout.ep=3 does not divide the 4 ranks of this run, allowed: 1, 2, 4"),
        (
            Layout(pp=2, ep=4, etp=2),
            8,
            "layout.ep=4 x layout.etp=2 = 8 does not divide the 4 ranks of a pipeline stage, "
            "allowed: products of 1, 2, 4",
        ),
    ],
)
def test_impossible_for_the_world(layout, world, message):
    with pytest.raises(ConfigError) as caught:
        layout.resolve(world)
    assert str(caught.value) == message


@pytest.mark.parametrize("sizes", [*({name: 0} for name in FIELDS), {"dp_shard": -1}])
def test_sizes_below_one(sizes):
    (name, size), *_ = sizes.items()
    with pytest.raises(ConfigError, match=f"layout.{name}={size} is too small, allowed: 1 or more"):
        Layout(**sizes)


def layouts(world, sizes):
    for cp, tp, pp, ep, etp, dp_shard in product(sizes, repeat=6):
        if world % (dp_shard * cp * tp * pp) == 0 and (world // pp) % (ep * etp) == 0:
            yield Layout(dp_shard=dp_shard, cp=cp, tp=tp, pp=pp, ep=ep, etp=etp).resolve(world)


def test_groups_are_those_of_megatron():
    """Megatron's order tp-cp-ep-dp-pp, its dp being our dp_replicate x dp_shard."""
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    compared = 0
    for world, sizes in ((16, (1, 2, 4)), (24, (1, 2, 3)), (512, (1, 8))):
        for layout in layouts(world, sizes):
            order = "tp-cp-ep-dp-pp"
            dense = parallel_state.RankGenerator(layout.tp, 1, layout.data, layout.pp, layout.cp, order)
            experts = parallel_state.RankGenerator(layout.etp, layout.ep, layout.edp, layout.pp, 1, order)
            ours = layout.groups()
            assert same(ours["tp"], dense.get_ranks("tp"))
            assert same(ours["cp"], dense.get_ranks("cp"))
            assert same(ours["pp"], dense.get_ranks("pp")) and same(ours["pp"], experts.get_ranks("pp"))
            assert same(ours["sequence"], dense.get_ranks("tp-cp"))
            assert same(ours["stage"], dense.get_ranks("tp-cp-dp"))
            assert same(products(ours["dp_replicate"], ours["dp_cp"]), dense.get_ranks("dp-cp"))
            assert same(ours["ep"], experts.get_ranks("ep"))
            assert same(ours["etp"], experts.get_ranks("tp"))
            assert same(ours["dispatch"], experts.get_ranks("tp-ep"))
            assert same(products(ours["edp_replicate"], ours["edp_shard"]), experts.get_ranks("dp"))
            data_ranks = [[layout.data_rank(rank) for rank in group] for group in dense.get_ranks("dp")]
            assert all(ranks == list(range(layout.data)) for ranks in data_ranks)
            compared += 1
    assert compared > 400


def same(one, other):
    return sorted(map(list, one)) == sorted(map(list, other))


def products(one, other):
    """The groups that two kinds of groups span together."""
    of = {rank: group for group in one for rank in group}
    joined = {tuple(sorted({member for rank in group for member in of[rank]})) for group in other}
    return list(joined)


def test_coordinates_count_the_groups():
    layout = Layout(dp_shard=2, cp=2, tp=2, pp=2, ep=4, etp=2).resolve(32)
    groups = layout.groups()
    for name in ("pp", "dp_replicate", "cp", "tp", "ep", "etp"):
        for group in groups[name]:
            assert [getattr(layout.coordinates(rank), name) for rank in group] == list(range(len(group)))
    for group in groups["dispatch"]:
        at = [layout.coordinates(rank) for rank in group]
        assert [place.ep * layout.etp + place.etp for place in at] == list(range(8))
    for group in groups["sequence"]:
        at = [layout.coordinates(rank) for rank in group]
        assert [place.cp * layout.tp + place.tp for place in at] == list(range(4))
