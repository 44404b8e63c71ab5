"""Router statistics: closed forms, and N ranks against one process."""

import math

import pytest
import torch

from scatterfold.moe.context import StepContext
from scatterfold.moe.routers import RouterOutput, TopKRouter
from scatterfold.moe.training.router_statistics import RouterStatistics


def routed(counts, dropped=0, entropy=0.0, **losses):
    return RouterOutput(
        routing=None,
        losses={name: torch.tensor(value) for name, value in losses.items()},
        counts=torch.tensor(counts),
        dropped=torch.tensor(dropped),
        entropy=torch.tensor(entropy),
    )


def summary_of(counts, tokens, **kwargs):
    statistics = RouterStatistics([0], len(counts))
    statistics.record(0, routed(counts, **kwargs), tokens)
    return statistics.reduce(lambda t: t).summary()


def test_balanced_load():
    figures = summary_of([6, 6, 6, 6], tokens=12, entropy=12 * math.log(4))
    assert figures == {
        "experts/max_violation": 0.0,
        "experts/load_entropy": pytest.approx(1.0),
        "experts/load_cv": 0.0,
        "experts/dropped_fraction": 0.0,
        "experts/router_entropy": pytest.approx(math.log(4)),
        "experts/per_token": 2.0,
        "experts/worst_max_violation": 0.0,
        "experts/dead": 0.0,
    }


def test_collapsed_load():
    figures = summary_of([0, 12, 0, 0], tokens=12, dropped=9)
    assert figures["experts/max_violation"] == 3.0  # E / K - 1
    assert figures["experts/load_entropy"] == 0.0
    assert figures["experts/load_cv"] == pytest.approx(math.sqrt(3.0))
    assert figures["experts/dead"] == 3.0
    assert figures["experts/dropped_fraction"] == 0.75
    assert figures["experts/per_token"] == 1.0


def test_two_experts_of_four():
    figures = summary_of([8, 8, 0, 0], tokens=8)
    assert figures["experts/max_violation"] == 1.0
    assert figures["experts/load_entropy"] == pytest.approx(0.5)
    assert figures["experts/load_cv"] == pytest.approx(1.0)


def test_layers_are_averaged_losses_added_and_the_worst_is_named():
    statistics = RouterStatistics([2, 5], 2)
    statistics.record(2, routed([4, 4], z_loss=1.0), 4)
    statistics.record(5, routed([8, 0], z_loss=2.0), 8)
    step = statistics.reduce(lambda t: t)
    figures = step.summary()
    assert figures["aux/z_loss"] == 3.0
    assert figures["experts/max_violation"] == 0.5
    assert figures["experts/worst_max_violation"] == 1.0
    assert figures["experts/dead"] == 1.0
    assert figures["experts/per_token"] == 1.5
    first, second = step.per_layer()
    assert (first["layer"], first["load"], first["aux/z_loss"]) == (2, [0.5, 0.5], 1.0)
    assert (second["layer"], second["load"], second["aux/z_loss"]) == (5, [1.0, 0.0], 2.0)


def test_losses_are_weighted_by_tokens():
    statistics = RouterStatistics([0], 2)
    statistics.record(0, routed([1, 1], z_loss=1.0), 1)
    statistics.record(0, routed([3, 3], z_loss=5.0), 3)
    assert statistics.reduce(lambda t: t).losses["z_loss"].tolist() == [4.0]


def test_ranks_that_are_summed_equal_one_process_in_one_call():
    torch.manual_seed(0)
    routers = [TopKRouter(6, 5, 2, balance_sequence=0.1, z_loss=0.1, capacity_factor=0.7) for _ in range(2)]
    batches = torch.randn(4, 3, 8, 6)  # micro-batches of three sequences

    def collect(own):
        statistics = RouterStatistics([0, 1], 5)
        for batch in own:
            for layer, router in enumerate(routers):
                statistics.record(layer, router(batch.flatten(0, 1), StepContext(3)), 24)
        return statistics

    alone = collect(batches).reduce(lambda t: t)
    sent = []
    collect(batches[2:]).reduce(lambda t: sent.append(t) or t)
    together = collect(batches[:2]).reduce(lambda t: t + sent[0])
    assert len(sent) == 1
    assert torch.equal(together.counts, alone.counts)
    assert torch.equal(together.dropped, alone.dropped)
    assert alone.dropped.sum() > 0
    assert together.summary() == pytest.approx(alone.summary(), rel=1e-6)


def test_reduce_starts_the_next_step():
    statistics = RouterStatistics([0], 2)
    statistics.record(0, routed([4, 4], z_loss=1.0), 4)
    first = statistics.reduce(lambda t: t)
    second = statistics.reduce(lambda t: t)
    assert first.counts.tolist() == [[4, 4]]
    assert second.counts.tolist() == [[0, 0]]
    assert second.losses == {}
    assert second.summary()["experts/dead"] == 2.0


def test_a_dense_model_has_no_figures_and_sends_nothing():
    def refuse(tensor):
        raise AssertionError("nothing to send")

    step = RouterStatistics([], 8).reduce(refuse)
    assert step.summary() == {}
    assert step.per_layer() == []


def test_counts_of_many_tokens_stay_exact():
    statistics = RouterStatistics([0], 2)
    for _ in range(3):
        statistics.record(0, routed([2**40 + 1, 1]), 2**40)
    assert statistics.reduce(lambda t: t).counts.tolist() == [[3 * 2**40 + 3, 3]]
