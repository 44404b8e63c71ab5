"""The inventory against the built model; cuts of parameters against torch's own."""

import itertools

import pytest
import torch
from jobs import MODEL, config, job, workload

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.estimate.groups import Span, span, stride_and_size
from scatterfold.moe.estimate.inventory import held
from scatterfold.parallel import Layout

MODELS = {
    "moe": {},
    "dense": {"num_experts": 0},
    "tied": {"tie_embeddings": True},
    "mixed": {"moe_layers": [1], "shared_expert_width": 8, "attention_bias": True, "qk_norm": "head"},
}


@pytest.mark.parametrize("name", MODELS)
def test_it_holds_every_parameter_of_the_model(name):
    load = workload(model=MODELS[name])
    model = ModelPlan.from_config(config(model=MODELS[name])).make_model()
    assert load.inventory.total == sum(parameter.numel() for parameter in model.parameters())
    listed = [p for kind in load.inventory.layers for p in load.inventory.kinds[kind]]
    shapes = [tuple(parameter.shape) for key, parameter in model.named_parameters() if key.startswith("blocks.")]
    assert [parameter.shape for parameter in listed] == shapes
    assert len(load.inventory.kinds) == len(set(load.inventory.layers)) == (2 if name == "mixed" else 1)


def test_frozen_parameters_get_no_gradient():
    load = workload(model={"frozen": ["blocks.*.attention.*"]})
    frozen = [p for p in load.inventory.kinds[0] if not p.trained]
    assert [p.shape for p in frozen] == [(32, 32), (16, 32), (16, 32), (32, 32)]


@pytest.mark.parametrize(("size", "ways"), [(7, 2), (8, 2), (261, 4), (3, 4)])
def test_the_fullest_rank_has_as_much_as_torch_gives_the_first(size, ways):
    chunk = torch.arange(size).chunk(ways)[0].numel()
    load = workload(model={"vocab_size": max(size, 257)})
    table = load.inventory.first[0]
    whole = table.shape[0] * MODEL["width"]
    found = held(table, Layout(dp_shard=ways).resolve(ways), "fp32")
    assert found.gathered == whole
    rows = torch.arange(table.shape[0]).chunk(ways)[0].numel()
    assert found.stored == rows * MODEL["width"]
    assert -(-size // ways) == chunk


def test_what_must_not_be_rounded_stays_whole_under_bf16():
    layout = Layout(dp_shard=2).resolve(2)
    for parameter in workload().inventory.kinds[0]:
        assert held(parameter, layout, "fp32").by_fsdp
        exact = len(parameter.shape) == 1 or parameter.shape == (4, 32)  # norms, and the router
        assert held(parameter, layout, "bf16").by_fsdp is not exact


@pytest.mark.parametrize(
    ("world", "sizes"),
    [
        (8, {"dp_shard": 2, "tp": 2, "ep": 4}),
        (16, {"pp": 2, "dp_shard": 2, "cp": 2, "ep": 2, "etp": 2}),
        (24, {"tp": 3, "dp_shard": 2, "pp": 2, "ep": 6}),
        (12, {"cp": 2, "ep": 3}),
    ],
)
@pytest.mark.parametrize("nodes_of", [2, 3, 8])
def test_groups_are_those_of_the_layout(world, sizes, nodes_of):
    layout = Layout(**sizes).resolve(world)
    for name, groups in layout.groups().items():
        stride, size = stride_and_size(layout, name)
        assert len(groups[0]) == size, name
        assert size == 1 or all(b - a == stride for group in groups for a, b in itertools.pairwise(group)), name
        assert span(layout, name, nodes_of) == _counted(groups, nodes_of), name


def _counted(groups, nodes_of):
    """Rank by rank."""
    size = len(groups[0])
    crossing = ring = line = apart = pairs = 0
    inside = size
    for group in groups:
        for index, rank in enumerate(group):
            following = group[(index + 1) % size]
            crossing = rank // nodes_of != following // nodes_of
            ring += crossing
            line += crossing and index + 1 < size
            inside = min(inside, sum(other // nodes_of == rank // nodes_of for other in group))
            apart += sum(other // nodes_of != rank // nodes_of for other in group)
            pairs += size - 1
    steps = len(groups) * (size - 1)
    world = len(groups) * size
    return Span(size, inside, ring / world, line / steps if steps else 0.0, apart / pairs if pairs else 0.0)


def test_rows_of_a_bounded_buffer_are_those_of_the_dispatcher():
    from scatterfold.kernels import Routing
    from scatterfold.parallel.dispatchers.tables import Limits

    bounded = job(2, layout={"ep": 2}, dispatcher={"capacity_factor": 0.7})
    chosen = torch.zeros(bounded.tokens, 2, dtype=torch.long) + torch.arange(2)
    routing = Routing.from_topk(chosen, torch.ones(chosen.shape), 4)
    limit = Limits.of_chunk(0.7, routing, 2, bounded.tokens, 0)
    assert bounded.rows == 2 * limit.pairs and bounded.assignments == 2 * limit.assignments
