"""Index tables of a dispatch against loops over tokens, and what needs no second process."""

import math
import random
from collections import defaultdict

import pytest
import torch

from scatterfold.kernels import ConfigError, Routing
from scatterfold.moe.experts import Experts
from scatterfold.moe.layer import MoELayer
from scatterfold.moe.routers import TopKRouter
from scatterfold.parallel import Layout
from scatterfold.parallel.dispatchers import AllGatherDispatcher, AllToAllDispatcher, LocalDispatcher, run_experts
from scatterfold.parallel.dispatchers.rows import collect, pick, spread
from scatterfold.parallel.dispatchers.tables import Limits, Plan, ReturnTable
from scatterfold.parallel.meshes import Meshes


def random_routing(seed, tokens, experts, padded=True):
    """A routing with up to E experts per token and padding, and its assignments as a list of (token, expert)."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=g).argsort(-1)
    keep = torch.rand(tokens, experts, generator=g) < (0.4 if padded else 2.0)
    routing = Routing.from_topk(ids, torch.rand(tokens, experts, generator=g), experts, keep)
    pairs = [(t, int(ids[t, k])) for t in range(tokens) for k in range(experts) if keep[t, k]]
    return routing, sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def plan_by_hand(pairs, tokens, experts, ep, chunks, limit=None):
    """{(chunk, ep index): (tokens of its pairs, [(token, expert)])} that are sent."""
    span, local = math.ceil(tokens / chunks), experts // ep
    blocks = defaultdict(lambda: ([], []))
    for chunk in range(chunks):
        for d in range(ep):
            wanted = [(t, e) for t, e in pairs if t // max(span, 1) == chunk and e // local == d]
            kept, full = [], False
            for token in sorted({t for t, _ in wanted}):
                own = [pair for pair in wanted if pair[0] == token]
                total = sum(t in kept for t, _ in wanted) + len(own)
                full = full or (limit is not None and (len(kept) + 1 > limit[chunk][0] or total > limit[chunk][1]))
                if not full:
                    kept.append(token)
            blocks[chunk, d] = kept, [pair for pair in wanted if pair[0] in kept]
    return span, blocks


@pytest.mark.parametrize("seed", range(40))
def test_plan_equals_the_loop(seed):
    rng = random.Random(seed)
    ep, local, chunks = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5])
    tokens, experts = rng.choice([0, 1, 2, 7, 16]), ep * local
    factor = rng.choice([None, 0.1, 0.4, 1.0, 10.0])
    routing, pairs = random_routing(seed, tokens, experts)
    plan = Plan.of(routing, ep, chunks, factor)
    limit = None
    if factor is not None:
        limits = [Limits.of_chunk(factor, routing, ep, plan.span, chunk) for chunk in range(chunks)]
        limit = [(one.pairs, one.assignments) for one in limits]
    span, blocks = plan_by_hand(pairs, tokens, experts, ep, chunks, limit)
    order = iter(plan.order.tolist())
    listed = iter(plan.tokens.tolist())
    sent = 0
    for chunk in range(chunks):
        assert plan.chunk_size(chunk) == len([t for t in range(tokens) if t // max(span, 1) == chunk])
        for d in range(ep):
            own_tokens, own = blocks[chunk, d]
            assert int(plan.pairs[chunk, d]) == len(own_tokens)
            assert [next(listed) + chunk * span for _ in own_tokens] == own_tokens
            counts = [sum(e == d * local + n for _, e in own) for n in range(local)]
            assert plan.assignments[chunk, d].tolist() == counts
            numbers = [next(order) for _ in own]
            assert [pairs[n] for n in numbers] == own
            assert [int(plan.row[n]) for n in numbers] == [own_tokens.index(t) for t, _ in own]
            assert [int(plan.token[n]) + chunk * span for n in numbers] == [t for t, _ in own]
            sent += len(own)
    assert (plan.dropped is None) == (factor is None)
    assert plan.dropped is None or int(plan.dropped) == len(pairs) - sent
    assert factor != 10.0 or sent == len(pairs)


def test_limits_are_a_share_of_the_slots():
    routing, _ = random_routing(0, tokens=10, experts=4, padded=False)  # 40 slots
    assert Limits.of_chunk(1.0, routing, ep=2, span=10, chunk=0) == Limits(pairs=10, assignments=20)
    assert Limits.of_chunk(0.25, routing, ep=2, span=10, chunk=0) == Limits(pairs=5, assignments=5)
    assert Limits.of_chunk(1.1, routing, ep=2, span=10, chunk=0) == Limits(pairs=10, assignments=20)  # all there can be
    assert Limits.of_chunk(0.5, routing, ep=2, span=4, chunk=2) == Limits(pairs=2, assignments=2)  # the last two tokens
    empty, _ = random_routing(0, tokens=0, experts=4)
    assert Limits.of_chunk(1.0, empty, ep=2, span=0, chunk=0) == Limits(0, 0)


def table(present, token, span=None):
    """Rows of each rank one after the other."""
    place = present.cumsum(1) - 1
    sizes = present.sum(1)
    return ReturnTable.of(present, place, sizes.cumsum(0) - sizes, token, span or present.shape[1])


def test_spread_and_collect_are_each_others_transpose():
    torch.manual_seed(0)
    present = torch.rand(3, 5) < 0.5
    token = present.nonzero()[:, 1]
    rows = table(present, token)
    matrix = torch.nn.functional.one_hot(token, 5).double()  # (R, T)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(len(token), 4, dtype=torch.float64)
    torch.testing.assert_close(spread(x, rows), matrix @ x)
    torch.testing.assert_close(collect(y, rows), matrix.T @ y)
    assert torch.autograd.gradcheck(lambda x: spread(x, rows), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda y: collect(y, rows), y.requires_grad_())


def test_what_the_table_does_not_name_is_padding():
    present = torch.tensor([[True, False, True], [False, True, True]])
    rows = ReturnTable.of(
        present, torch.tensor([0, 1, 2]).expand(2, 3), torch.tensor([0, 4]), torch.arange(4).repeat(2), 4
    )
    y = torch.full((8, 2), torch.nan)
    for rank, tokens in enumerate(present):
        for token in tokens.nonzero().flatten().tolist():
            y[rank * 4 + token] = 10.0**rank
    assert collect(y, rows)[:, 0].tolist() == [1.0, 10.0, 11.0]


def test_pick_leaves_gaps_at_zero():
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 3, 0, 3])
    assert pick(values, index).tolist() == [3.0, 0.0, 1.0, 0.0]
    assert torch.autograd.gradcheck(lambda v: pick(v, index), values)


@pytest.mark.parametrize("made", [LocalDispatcher, AllToAllDispatcher, AllGatherDispatcher])
@pytest.mark.parametrize("meshes", [None, Meshes()])
def test_one_process_sends_nothing(made, meshes):
    dispatcher = made(meshes)
    routing, _ = random_routing(0, 5, 4)
    x = torch.randn(5, 3)
    dispatched = dispatcher.dispatch(x, routing)
    (chunk,) = dispatched.chunks
    assert chunk.wait().rows is x and chunk.wait().routing is routing
    assert run_experts(dispatcher, dispatched, lambda rows, _: rows) is x
    assert dispatched.rows_sent == 0 and dispatched.dropped is None
    assert dispatcher.local_experts(4) == range(4)


def meshes_of(**sizes):
    """A place in a layout, without process groups."""
    return Meshes(layout=Layout(**sizes).resolve(4), rank=3)


def test_local_experts_are_blocks_in_the_order_of_ep():
    assert AllToAllDispatcher(meshes_of(ep=4)).local_experts(8) == range(6, 8)
    assert AllGatherDispatcher(meshes_of(ep=2, etp=2)).local_experts(8) == range(4, 8)
    assert AllToAllDispatcher(meshes_of(etp=4)).local_experts(8) == range(0, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LocalDispatcher(meshes_of(ep=2, etp=2)),
            "dispatcher=local cannot reach the experts of layout.ep=2 x layout.etp=2 ranks, "
            "allowed: dispatcher=all_to_all, dispatcher=all_gather",
        ),
        (lambda: AllToAllDispatcher(chunks=0), "dispatcher.chunks=0 is too small, allowed: 1 or more"),
        (
            lambda: AllGatherDispatcher(capacity_factor=0.0),
            "dispatcher.capacity_factor=0.0 is out of range, allowed: null, above 0",
        ),
        (
            lambda: MoELayer(TopKRouter(4, 6, 2), Experts(6, 4, 8), dispatcher=AllToAllDispatcher(meshes_of(ep=4))),
            "model.num_experts=6 does not divide by layout.ep=4, allowed: multiples of 4",
        ),
        (
            lambda: MoELayer(TopKRouter(4, 6, 2), Experts(6, 4, 6), dispatcher=AllGatherDispatcher(meshes_of(etp=4))),
            "model.expert_width=6 does not divide by layout.etp=4, allowed: multiples of 4",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message
