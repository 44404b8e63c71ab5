"""Legal layouts against trying every combination; the order; figures by hand."""

import itertools
from dataclasses import replace

import pytest
from jobs import job, workload

from scatterfold.kernels import ConfigError
from scatterfold.moe.estimate import DEVICES, SIZES, Job, evaluate, legal_layouts, peak_memory, search, step_time
from scatterfold.moe.estimate.devices import Link
from scatterfold.moe.estimate.memory import in_flight
from scatterfold.moe.estimate.step_time import forward_flops, idle
from scatterfold.moe.layout_checks import check_layout
from scatterfold.moe.models.counts import layer_costs
from scatterfold.parallel import Layout

MODEL = {"layers": 3, "heads": 4, "kv_heads": 2, "num_experts": 4, "expert_width": 12}


@pytest.mark.parametrize("world", [1, 6, 8])
def test_legal_layouts_are_those_that_training_accepts(world):
    load = workload(model=MODEL, data={"sequence_length": 24, "global_batch_size": 12, "micro_batch_size": 1})
    accepted = set()
    for sizes in itertools.product(range(1, world + 1), repeat=len(SIZES)):
        try:
            layout = Layout(**dict(zip(SIZES, sizes))).resolve(world)
            check_layout(layout, load.plan.model, 24)
            if layout.pp > 3 or 12 % layout.data or 12 // layout.data < layout.pp:
                raise ConfigError("fewer layers, sequences or micro-batches than it takes")
        except ConfigError:
            continue
        accepted.add(layout)
    found = list(legal_layouts(load, world))
    assert len(found) == len(set(found)) and set(found) == accepted and accepted


def test_sizes_that_are_given_are_kept():
    load = workload(model=MODEL)
    every = list(legal_layouts(load, 8))
    kept = list(legal_layouts(load, 8, {"tp": 2, "ep": 4}))
    assert kept == [layout for layout in every if layout.tp == 2 and layout.ep == 4] and kept


def test_the_order_is_by_speed_of_what_fits_and_always_the_same():
    load = workload(model=MODEL, data={"micro_batch_size": 1})
    needs = sorted(peak_memory(Job(load, layout)).total for layout in legal_layouts(load, 4))
    device = replace(DEVICES["cpu"], memory=int(needs[len(needs) // 2]) + 1)
    found = search(load, 4, device)
    fitting = [candidate for candidate in found if not candidate.refused]
    assert 0 < len(fitting) < len(found)
    assert found[: len(fitting)] == fitting
    speeds = [candidate.time.tokens_per_second for candidate in fitting]
    assert speeds == sorted(speeds, reverse=True)
    assert "of" in found[-1].refused and found[-1].memory.moment in found[-1].refused
    assert [candidate.layout for candidate in search(load, 4, device)] == [candidate.layout for candidate in found]


def test_no_legal_layout_is_one_line_with_the_reason():
    load = workload(model=MODEL, data={"global_batch_size": 8})
    with pytest.raises(ConfigError, match="layout.tp=3"):
        search(load, 3, DEVICES["h100"], {"tp": 3})
    with pytest.raises(ConfigError, match="no layout of gpus=7 is legal"):
        search(load, 7, DEVICES["h100"])


def test_forward_operations_are_a_third_of_those_that_are_counted():
    for model in ({}, {"num_experts": 0}, {"shared_expert_width": 8, "sliding_window": 5}):
        estimated = job(model=model)
        config = estimated.workload.config
        top_k = estimated.workload.experts_per_token
        costs, _ = layer_costs(config, top_k, sequence_length=32)
        attention, half = forward_flops(estimated, 0)
        vectors = 2 * config.width  # norms, which layer_costs counts as products
        ours = 3 * (sum(attention.values()) + sum(half.values())) / estimated.tokens
        assert ours == pytest.approx(costs[0] - 6 * vectors)


def test_a_rank_computes_its_share():
    whole = job(model=MODEL)
    for world, layout in ((4, {"dp_shard": 4}), (2, {"tp": 2}), (2, {"cp": 2}), (4, {"ep": 2, "etp": 2})):
        part = job(world, model=MODEL, layout=layout)
        for ours, alone in zip(forward_flops(part, 0), forward_flops(whole, 0)):
            for kind, flops in ours.items():
                assert flops * world == pytest.approx(alone[kind] * part.micro_batches / whole.micro_batches), kind


def test_step_time_by_hand():
    """One dense layer on one rank: everything but products is free."""
    scale = {"dense": 2.0, "moe": 9.0, "head": 3.0}
    free = replace(
        DEVICES["cpu"], bandwidth=1e30, layer_seconds={"dense": 0.25, "moe": 9.0}, step_seconds=1.0, scale=scale
    )
    estimated = job(model={"num_experts": 0, "layers": 1})
    rates, tokens = free.rates["fp32"], 8 * 32
    dense = tokens * 2 * 32 * (2 * 32 + 2 * 16 + 3 * 24)
    attention = tokens * 4 * 32 * 33 / 2
    head = tokens * 2 * 32 * 260
    layer = dense / rates.dense + attention / rates.attention
    expected = 3 * (2.0 * layer + 3.0 * head / rates.head) + 0.25 + 1.0
    found = step_time(estimated, free)
    assert found.total == pytest.approx(expected)
    assert found.tokens_per_second == pytest.approx(tokens / expected)
    flops = estimated.workload.counts.flops_per_token
    assert found.mfu == pytest.approx(flops * tokens / expected / free.peaks["fp32"])


@pytest.mark.parametrize(
    ("schedule", "pp", "micro_batches", "flight", "pause"),
    [  # the table of docs/pipeline.md
        ("gpipe", 4, 8, 8, 0.375),
        ("1f1b", 4, 8, 4, 0.375),
        ("interleaved", 4, 8, 5.5, 0.1875),
        ("zero_bubble", 4, 8, 4, 0.125),
        ("zero_bubble_v", 4, 8, 4, 0.0625),
    ],
)
def test_pipelines_idle_and_hold_as_their_page_says(schedule, pp, micro_batches, flight, pause):
    estimated = job(
        pp,
        model={"layers": 8},
        layout={"pp": pp},
        data={"micro_batch_size": 1},
        engine={"pipeline_schedule": schedule},
    )
    assert estimated.micro_batches == micro_batches
    assert in_flight(estimated, 0) == flight and idle(estimated) == pytest.approx(pause)


def test_slow_networks_favour_layouts_that_stay_inside_a_machine():
    load = workload(model={**MODEL, "layers": 4}, data={"micro_batch_size": 1})
    slow = replace(DEVICES["cpu"], ranks_per_node=2, network=Link(1e3, 1e-2))
    best = search(load, 4, slow)[0]
    assert best.layout.pp > 1 or best.layout.dp_shard == 1
    crossing = evaluate(load, Layout(tp=2, dp_shard=2).resolve(4), slow)
    assert sum(places["between"] for places in crossing.volume.values()) > 0
    assert crossing.volume["tp"]["between"] == 0 < crossing.volume["tp"]["inside"]


def test_more_recomputation_takes_less_memory_and_more_time():
    devices = DEVICES["h100"]
    found = {}
    for checkpointing in ("none", "selective", "full"):
        estimated = job(
            model={"layers": 8}, trainer={"activation_checkpointing": checkpointing}, data={"micro_batch_size": 4}
        )
        found[checkpointing] = (
            peak_memory(estimated).activations,
            step_time(estimated, replace(devices, asynchronous=False)),
        )
    kept = [memory for memory, _ in found.values()]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 3
    arithmetic = [time.arithmetic for _, time in found.values()]
    assert arithmetic == sorted(arithmetic) and len(set(arithmetic)) == 3
