"""Dispatchers in real processes: every case against one process that has all tokens and all experts.

The processes of a world size are started once. Each runs all cases and writes what failed; the tests read that.
"""

import contextlib
import itertools
import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from meshes_of import meshes_of
from torch import nn

from scatterfold.kernels import Routing
from scatterfold.moe.context import StepContext
from scatterfold.moe.experts import Experts
from scatterfold.moe.layer import MoELayer
from scatterfold.moe.recompute import checkpointed
from scatterfold.moe.routers import RouterOutput, ThresholdRouter, TopKRouter
from scatterfold.moe.sharding import EXPERT_WIDTH_DIMENSIONS
from scatterfold.moe.training.router_statistics import RouterStatistics
from scatterfold.parallel import Layout
from scatterfold.parallel.dispatchers import AllGatherDispatcher, AllToAllDispatcher, run_experts, transfer
from scatterfold.parallel.plan import StackedExperts, cut_experts
from scatterfold.parallel.process import running

pytestmark = pytest.mark.distributed

E, D, F, K = 8, 6, 4, 3
DISPATCHERS = {"all_to_all": AllToAllDispatcher, "all_gather": AllGatherDispatcher}
LAYOUTS = {2: ["ep2", "etp2"], 4: ["ep4", "ep2", "ep2etp2"]}  # the last but one leaves two copies of the experts
CASES = {}


def case(function=None, **axes):
    """Register a function of (place, **values) under every combination of the axes."""

    def register(function):
        for values in itertools.product(*axes.values()):
            name = "-".join([function.__name__, *(str(getattr(v, "__name__", v)) for v in values)])
            CASES[name] = (function, dict(zip(axes, values)))
        return function

    return register if function is None else register(function)


@dataclass
class Place:
    """This rank in one layout."""

    world: int
    rank: int
    meshes: object

    @property
    def ep(self):
        return self.meshes.layout.ep

    @property
    def etp(self):
        return self.meshes.layout.etp

    @property
    def at(self):
        return self.meshes.coordinates

    def peers(self):
        """World ranks of the dispatch group, in order."""
        size = self.ep * self.etp
        return range(self.rank // size * size, self.rank // size * size + size)

    def slice_of(self, name, whole):
        """What this rank holds of an expert parameter, by plain indexing."""
        own = whole.chunk(self.ep)[self.at.ep]
        dim = EXPERT_WIDTH_DIMENSIONS.get(name)
        return own if dim is None else own.chunk(self.etp, dim)[self.at.etp]


class ScriptedRouter(nn.Module):
    """A router whose choice is given and whose weights are learned: a softmax over the chosen experts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D, dtype=torch.float64))
        self.script = None

    def forward(self, hidden, context):
        ids, keep = self.script
        weights = (hidden @ self.weight.T).gather(1, ids).softmax(-1)
        zero = torch.zeros((), dtype=torch.int64)
        return RouterOutput(Routing.from_topk(ids, weights, E, keep), {}, zero, zero, zero)


def workloads(name, place, seed=0):
    """One script per step, each a list over the ranks of (ids (T, K), keep or None): W0 to W7."""
    g = torch.Generator().manual_seed(seed)
    world, local = place.world, E // place.ep

    def ids(tokens, allowed):
        return torch.stack([torch.tensor(allowed)[torch.randperm(len(allowed), generator=g)[:K]] for _ in range(tokens)]
                           ) if tokens else torch.zeros(0, K, dtype=torch.int64)  # fmt: skip

    def hot(rank):
        """Every token's first experts are on one rank; the others anywhere, where it has too few."""
        first = list(range(rank * local, (rank + 1) * local))
        rest = [e for e in range(E) if e not in first]
        chosen = (first + rest)[: max(K, local)]
        return [(ids(6, chosen), None) for _ in range(world)]

    everything = list(range(E))
    if name == "balanced":
        even = [torch.stack([(torch.arange(K) * 3 + t + r) % E for t in range(8)]) for r in range(world)]
        return [[(i, None) for i in even]]
    if name == "hot_expert":
        return [[(torch.cat([torch.full((7, 1), 2), 3 + ids(7, list(range(5)))[:, 1:]], 1), None)] * world]
    if name == "hot_rank":
        return [hot(place.ep - 1)]
    if name == "ragged_source":
        return [[(ids(t, everything), None) for t in (1, 9, 4, 6)[:world]]]
    if name == "zero_load_rank":  # the last experts get nothing, and the first rank has nothing
        used = everything[: E - local] if place.ep > 1 and E - local >= K else everything[:K]
        return [[(ids(0 if r == 0 else 5, used), None) for r in range(world)]]
    if name == "rotating_hotspot":
        return [hot(rank) for rank in range(place.ep)]
    if name == "burst":
        return [[(ids(t, everything), None) for _ in range(world)] for t in (2, 40, 1)]
    if name == "variable":  # any number of experts, none as well
        chosen = [ids(t, everything) for t in (6, 3, 8, 5)[:world]]
        return [[(i, torch.rand(i.shape, generator=g) < 0.5) for i in chosen]]
    raise ValueError(name)


def make_layer(router, dispatcher=None, bias=False, shared=False, seed=1):
    torch.manual_seed(seed)
    experts = Experts(E, D, F, bias=bias).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return MoELayer(router, experts, nn.Linear(D, D).double() if shared else None, dispatcher)


def cut(layer, place):
    cut_experts(StackedExperts(layer.experts, EXPERT_WIDTH_DIMENSIONS), place.meshes.experts)
    return layer


def sum_over_copies(layer, place):
    """What an engine does: sum over copies of the experts, and what all etp ranks hold over these."""
    for name, parameter in layer.experts.named_parameters():
        grad = parameter.grad.to_local()
        if place.world > place.ep * place.etp:
            dist.all_reduce(grad, group=place.meshes.experts_data.get_group("edp_replicate"))
        if place.etp > 1 and name not in EXPERT_WIDTH_DIMENSIONS:
            dist.all_reduce(grad, group=place.meshes.experts.get_group("etp"))


def check_against_one_process(place, make_router, dispatcher, batches, scripts=None, context=None, **options):
    """Run this rank's part of each batch through the dispatcher, and the whole through one process."""
    layer, whole = cut(make_layer(make_router(), dispatcher, **options), place), make_layer(make_router(), **options)
    whole.load_state_dict(make_layer(make_router(), **options).state_dict())
    for model in (layer, whole):
        torch.manual_seed(7)
        for parameter in model.router.parameters():
            nn.init.normal_(parameter)
    for step, batch in enumerate(batches):
        if scripts is not None:
            layer.router.script = scripts[step][place.rank]
            kept = [torch.ones_like(ids, dtype=torch.bool) if keep is None else keep for ids, keep in scripts[step]]
            whole.router.script = torch.cat([ids for ids, _ in scripts[step]]), torch.cat(kept)
        own = batch[place.rank].clone().requires_grad_()
        everything = torch.cat(batch).requires_grad_()
        scale = torch.linspace(-1, 1, D, dtype=torch.float64)
        for model, x in ((layer, own), (whole, everything)):
            model.zero_grad()
            out = model(x, context or StepContext(global_tokens=len(everything)))
            (out * scale * out).sum().backward()
            if model is layer:
                result = out
        sum_over_copies(layer, place)
        for parameter in (*layer.router.parameters(), *(() if layer.shared is None else layer.shared.parameters())):
            dist.all_reduce(parameter.grad)
        start = sum(len(part) for part in batch[: place.rank])
        mine = slice(start, start + len(own))
        torch.testing.assert_close(result, out[mine])
        torch.testing.assert_close(own.grad, everything.grad[mine])
        for name, parameter in whole.named_parameters():
            grad = layer.get_parameter(name).grad
            if name.startswith("experts."):
                torch.testing.assert_close(grad.to_local(), place.slice_of(name[8:], parameter.grad), msg=name)
            else:
                torch.testing.assert_close(grad, parameter.grad, msg=name)


def random_batches(scripts, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(len(ids), D, dtype=torch.float64, generator=g) for ids, _ in script] for script in scripts]


WORKLOADS = [
    "balanced", "hot_expert", "hot_rank", "ragged_source", "zero_load_rank", "rotating_hotspot", "burst", "variable",
]  # fmt: skip


@case(dispatcher=DISPATCHERS, workload=WORKLOADS, chunks=[1, 3])
def layer_equals_one_process(place, dispatcher, workload, chunks):
    scripts = workloads(workload, place)
    made = DISPATCHERS[dispatcher](place.meshes, chunks=chunks)
    check_against_one_process(place, ScriptedRouter, made, random_batches(scripts), scripts)


@case(dispatcher=DISPATCHERS, router=["top_k", "threshold"])
def layer_with_a_learned_router_biases_and_a_shared_expert(place, dispatcher, router):
    losses = {"balance_sequence": 0.0, "z_loss": 0.1}
    make = {
        "top_k": lambda: TopKRouter(D, E, K, **losses).double(),
        "threshold": lambda: ThresholdRouter(D, E, 0.6, 5, **losses).double(),
    }[router]
    g = torch.Generator().manual_seed(0)
    batches = [[torch.randn(t, D, dtype=torch.float64, generator=g) for t in (5, 0, 7, 3)[: place.world]]]
    made = DISPATCHERS[dispatcher](place.meshes, chunks=2)
    check_against_one_process(place, make, made, batches, bias=True, shared=True)


@case(dispatcher=DISPATCHERS, seed=range(8))
def random_cases(place, dispatcher, seed):
    """Any numbers of tokens, any experts, any chunks."""
    g = torch.Generator().manual_seed(seed)
    script = []
    for _ in range(place.world):
        tokens = int(torch.randint(0, 14, (), generator=g))
        scores = torch.rand(tokens, E, generator=g)
        k = int(torch.randint(1, E + 1, (), generator=g)) if seed % 2 else K
        keep = torch.rand(tokens, k, generator=g) < torch.rand((), generator=g)
        script.append((scores.argsort(-1)[:, :k], keep))
    width = max(ids.shape[1] for ids, _ in script)
    script = [  # as many slots on each rank, so that the whole batch is one table
        (torch.cat([ids, _others(ids, width)], 1), nn.functional.pad(keep, (0, width - ids.shape[1])))
        for ids, keep in script
    ]
    made = DISPATCHERS[dispatcher](place.meshes, chunks=1 + seed % 4)
    check_against_one_process(place, ScriptedRouter, made, random_batches([script]), [script])


def _others(ids, width):
    rows = [[e for e in range(E) if e not in row][: width - len(row)] for row in ids.tolist()]
    return torch.tensor(rows, dtype=torch.int64).view(len(ids), width - ids.shape[1])


def identity_experts(rows, routing):
    """Expert e returns its input: the sum of the weights of each row, times the row."""
    used = int(routing.expert_offsets[-1])
    mass = torch.zeros(len(rows), dtype=routing.weight.dtype).index_add(
        0, routing.token[:used].long(), routing.weight[:used]
    )
    return (rows * mass[:, None]).to(rows.dtype)


def own_routing(place, script, weights=None):
    ids, keep = script[place.rank]
    weights = torch.full(ids.shape, 1 / K, dtype=torch.float64) if weights is None else weights
    return Routing.from_topk(ids, weights, E, keep)


@case(dispatcher=DISPATCHERS, chunks=[1, 3])
def identity_experts_return_the_tokens(place, dispatcher, chunks):
    if place.etp > 1:
        return  # each slice of an expert would return the row
    script = workloads("ragged_source", place)[0]
    x = random_batches([script])[0][place.rank]
    made = DISPATCHERS[dispatcher](place.meshes, chunks=chunks)
    out = run_experts(made, made.dispatch(x, own_routing(place, script)), identity_experts)
    torch.testing.assert_close(out, x)


@contextlib.contextmanager
def counted():
    """Record (name, what was sent) of every collective that sends rows or assignments."""
    sent = []
    originals = {"all_to_all_single": dist.all_to_all_single}

    def all_to_all_single(out, x, *args, **kwargs):
        sent.append((out, x, args))
        return originals["all_to_all_single"](out, x, *args, **kwargs)

    dist.all_to_all_single = all_to_all_single
    try:
        yield sent
    finally:
        dist.all_to_all_single = originals["all_to_all_single"]


def distinct_remote_pairs(place, script):
    """By hand: (token, rank) pairs of this rank's tokens and other ranks that hold (slices of) their experts."""
    ids, keep = script[place.rank]
    pairs = set()
    for token, row in enumerate(ids.tolist()):
        for slot, expert in enumerate(row):
            if keep is None or keep[token, slot]:
                ep_index = expert // (E // place.ep)
                pairs |= {(token, ep_index * place.etp + etp) for etp in range(place.etp)}
    own = place.at.ep * place.etp + place.at.etp
    return len({pair for pair in pairs if pair[1] != own})


@case(workload=["hot_rank", "ragged_source", "variable", "balanced"], chunks=[1, 2])
def rows_sent_are_the_distinct_pairs(place, workload, chunks):
    script = workloads(workload, place)[0]
    x = random_batches([script])[0][place.rank]
    own = place.at.ep * place.etp + place.at.etp
    made = AllToAllDispatcher(place.meshes, chunks=chunks)
    with counted() as sent:
        dispatched = made.dispatch(x, own_routing(place, script))
        arrivals = [chunk.wait() for chunk in dispatched.chunks]
        for pending in [made.combine(a.rows, a) for a in arrivals]:
            pending.wait()
    rows = [(args[1], args[0]) for _, t, args in sent if t.dim() == 2 and t.shape[1] == D]
    forth, back = rows[:chunks], rows[chunks:]
    travelled = sum(sum(splits) - splits[own] for splits, _ in forth)
    assert dispatched.rows_sent == travelled == distinct_remote_pairs(place, script)
    assert sum(sum(splits) - splits[own] for _, splits in back) == travelled  # one sum for each comes back


@case(dispatcher=DISPATCHERS, workload=["hot_rank", "ragged_source", "variable"], chunks=[1, 2])
def every_expert_gets_its_tokens_in_order(place, dispatcher, workload, chunks):
    """Rows are tagged with rank and token, so that what each expert sees can be compared with the script."""
    script = workloads(workload, place)[0]
    tokens = len(script[place.rank][0])
    x = torch.stack([torch.full((tokens,), float(place.rank)), torch.arange(tokens).float()], 1)
    weights = torch.rand(tokens, K, generator=torch.Generator().manual_seed(place.rank))
    made = DISPATCHERS[dispatcher](place.meshes, chunks=chunks)
    arrivals = [c.wait() for c in made.dispatch(x, own_routing(place, script, weights)).chunks]
    mine = made.local_experts(E)
    expected = {e: [] for e in mine}
    for rank in place.peers():
        ids, keep = script[rank]
        weights = torch.rand(len(ids), K, generator=torch.Generator().manual_seed(rank))
        for token, row in enumerate(ids.tolist()):
            for slot, expert in enumerate(row):
                if expert in mine and (keep is None or keep[token, slot]):
                    expected[expert].append((rank, token, float(weights[token, slot])))
    found = {e: [] for e in mine}
    for arrival in arrivals:
        routing, offsets = arrival.routing, arrival.routing.expert_offsets.tolist()
        for at, e in enumerate(mine):
            span = range(offsets[at], offsets[at + 1])
            seen = [(*arrival.rows[int(routing.token[n])].int().tolist(), float(routing.weight[n])) for n in span]
            assert seen == sorted(seen)
            found[e] += seen
            for n in span:  # the same list seen by token
                row = int(routing.token[n])
                first, last = routing.token_offsets[row : row + 2].tolist()
                assert n in routing.assignment[first:last].tolist()
    assert {e: sorted(seen) for e, seen in found.items()} == {e: sorted(seen) for e, seen in expected.items()}


def run_layer(place, dispatcher, script, seed=5):
    layer = cut(make_layer(ScriptedRouter(), dispatcher), place)
    torch.manual_seed(7)
    nn.init.normal_(layer.router.weight)
    layer.router.script = script[place.rank]
    x = random_batches([script], seed)[0][place.rank].requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    return [out, x.grad, *(p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in layer.parameters())]


@case(workload=["hot_rank", "ragged_source", "variable"], chunks=[1, 2])
def all_gather_gives_the_bits_of_all_to_all(place, workload, chunks):
    script = workloads(workload, place)[0]
    ours, other = (run_layer(place, cls(place.meshes, chunks=chunks), script) for cls in DISPATCHERS.values())
    assert all(torch.equal(a, b) for a, b in zip(ours, other))


@case(dispatcher=DISPATCHERS, workload=["hot_rank", "balanced"], chunks=[1, 2])
def ample_capacity_gives_the_bits_of_no_limit(place, dispatcher, workload, chunks):
    script = workloads(workload, place)[0]
    made = (DISPATCHERS[dispatcher](place.meshes, factor, chunks) for factor in (None, 100.0))
    ours, other = (run_layer(place, each, script) for each in made)
    assert all(torch.equal(a, b) for a, b in zip(ours, other))


def kept_by_hand(place, script, factor, chunks):
    """Slots (T, K) that fit: per chunk and ep index, earlier tokens first, a token's slots together or not at all."""
    ids, keep = script[place.rank]
    kept = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep.clone()
    tokens, local = len(ids), E // place.ep
    span = -(-tokens // chunks)
    for start in range(0, tokens, span):
        chunk = range(start, min(start + span, tokens))
        fair = factor * ids.numel() * len(chunk) / tokens / place.ep
        limit = min(int(-(-fair // 1)), ids.numel(), len(chunk) * local)
        for ep_index in range(place.ep):
            pairs = assignments = 0
            for token in chunk:
                slots = (ids[token] // local == ep_index) & kept[token]
                if not slots.any():
                    continue
                pairs, assignments = pairs + 1, assignments + int(slots.sum())
                if pairs > min(limit, len(chunk)) or assignments > limit:
                    kept[token] &= ~slots
                    pairs = assignments = 10**6  # nothing after the first that does not fit
    return kept


@case(dispatcher=DISPATCHERS, workload=["hot_rank", "hot_expert", "balanced"], factor=[0.3, 1.0], chunks=[1, 2])
def capacity_drops_the_later_pairs(place, dispatcher, workload, factor, chunks):
    script = workloads(workload, place)[0]
    ids, _ = script[place.rank]
    x = random_batches([script])[0][place.rank].requires_grad_()
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(place.rank))
    weights.requires_grad_()
    made = DISPATCHERS[dispatcher](place.meshes, factor, chunks)
    dispatched = made.dispatch(x, own_routing(place, script, weights))
    out = run_experts(made, dispatched, identity_experts)
    kept = kept_by_hand(place, script, factor, chunks)
    mass = (weights * kept).sum(1, keepdim=True) * place.etp  # each slice returns the row
    torch.testing.assert_close(out, x * mass)
    assert int(dispatched.dropped) == int((~kept).sum())
    out.sum().backward()
    torch.testing.assert_close(x.grad, mass.expand_as(x))
    torch.testing.assert_close(weights.grad, x.sum(1, keepdim=True) * kept * place.etp)


@case(dispatcher=DISPATCHERS, chunks=[1, 3])
def host_waits_once_or_never(place, dispatcher, chunks):
    """Whatever makes the host wait for a CUDA device counts: once per layer, never with a capacity."""
    script = workloads("balanced", place)[0]
    x = random_batches([script])[0][place.rank]
    routing = own_routing(place, script)
    waits = []
    names = ("tolist", "item", "nonzero", "__bool__", "__int__", "__index__", "cpu", "numpy", "unique")
    originals = {name: getattr(torch.Tensor, name) for name in names}

    def watch(name):
        return lambda self, *a, **k: (waits.append(name), originals[name](self, *a, **k))[1]

    for factor, expected in ((None, ["tolist"]), (1.5, [])):
        made = DISPATCHERS[dispatcher](place.meshes, factor, chunks)
        waits.clear()
        for name in names:
            setattr(torch.Tensor, name, watch(name))
        try:
            run_experts(made, made.dispatch(x, routing), lambda rows, _: rows)
        finally:
            for name, original in originals.items():
                setattr(torch.Tensor, name, original)
        assert waits == expected, waits


@case(dispatcher=DISPATCHERS)
def no_tokens_anywhere(place, dispatcher):
    script = [(torch.zeros(0, K, dtype=torch.int64), None)] * place.world
    for factor in (None, 1.0):
        out, *grads = run_layer(place, DISPATCHERS[dispatcher](place.meshes, factor, 2), script)
        assert out.shape == (0, D)
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@case(dispatcher=DISPATCHERS)
def two_batches_may_be_in_flight(place, dispatcher):
    made = DISPATCHERS[dispatcher](place.meshes)
    scripts = [workloads("ragged_source", place, seed)[0] for seed in (0, 1)]
    tokens = [random_batches([script], seed)[0][place.rank] for seed, script in enumerate(scripts)]
    expected = [
        run_experts(made, made.dispatch(x, own_routing(place, script)), lambda rows, _: rows * 2)
        for x, script in zip(tokens, scripts)
    ]
    flights = [made.dispatch(x, own_routing(place, script)) for x, script in zip(tokens, scripts)]
    for flight, wanted in zip(flights, expected):
        assert torch.equal(run_experts(made, flight, lambda rows, _: rows * 2), wanted)


@case(dispatcher=DISPATCHERS)
def rows_travel_in_the_autocast_dtype(place, dispatcher):
    script = workloads("ragged_source", place)[0]
    layer = cut(make_layer(ScriptedRouter(), DISPATCHERS[dispatcher](place.meshes)).float(), place)
    whole = make_layer(ScriptedRouter()).float()
    results = []
    for model, autocast in ((layer, True), (whole, False)):
        torch.manual_seed(7)
        nn.init.normal_(model.router.weight)
        model.router.script = script[place.rank]
        x = random_batches([script])[0][place.rank].float().requires_grad_()
        with counted() as sent, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
        with counted() as back:
            out.float().sum().backward()
        if autocast:
            wide = {t.dtype for _, t, _ in sent + back if t.dim() == 2}
            assert wide == {torch.bfloat16}, wide
            assert out.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
        results.append((out.float(), x.grad))
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.3)


@case(dtype=[torch.bfloat16, torch.float16])
def half_precision_sums_are_rounded_once(place, dtype):
    """Sums over the ranks are exact in float32: 256 + 1 + ... would stay 256 if each addition were rounded."""
    tokens, made = 3, AllToAllDispatcher(place.meshes)
    ids = torch.arange(E).expand(tokens, E)
    dispatched = made.dispatch(torch.ones(tokens, D, dtype=dtype), Routing.from_topk(ids, torch.ones(tokens, E), E))
    at = place.at.ep * place.etp + place.at.etp
    value = 1024.0 if at == 0 else 2.5
    out = run_experts(made, dispatched, lambda rows, _: torch.full_like(rows, value))
    exact = torch.full((tokens, D), 1024.0 + 2.5 * (place.ep * place.etp - 1)).to(dtype)
    assert torch.equal(out, exact)


@case(dispatcher=DISPATCHERS)
def recomputation_changes_no_bit_and_skips_the_way_back(place, dispatcher):
    script = workloads("ragged_source", place)[0]
    results, messages = [], []
    for wrap in (lambda f, x: f(x), checkpointed):
        layer = cut(make_layer(ScriptedRouter(), DISPATCHERS[dispatcher](place.meshes), shared=True), place)
        torch.manual_seed(7)
        nn.init.normal_(layer.router.weight)
        layer.router.script = script[place.rank]
        x = random_batches([script])[0][place.rank].requires_grad_()
        out = wrap(layer, x)
        with counted() as sent:
            out.square().sum().backward()
        results.append([out, x.grad, *(parameter.grad for parameter in layer.parameters())])
        messages.append(len(sent))
    pairs = [(a.to_local(), b.to_local()) if hasattr(a, "to_local") else (a, b) for a, b in zip(*results)]
    assert all(torch.equal(a, b) for a, b in pairs)
    again = 3 if dispatcher == "all_gather" else 4  # sizes, rows' numbers, weights, and rows by all-to-all
    assert messages[1] == messages[0] + again, messages


class Logged(torch.autograd.Function):
    """The identity, which leaves a word when it runs and when its gradient does."""

    @staticmethod
    def forward(ctx, x, events, word):
        ctx.events, ctx.word = events, word
        events.append(word)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.events.append(ctx.word)
        return grad, None, None


@case(dispatcher=DISPATCHERS)
def messages_travel_while_the_rank_computes(place, dispatcher):
    """Two chunks: the order in which messages start, are waited for, and experts and the shared expert run."""
    script, events = workloads("ragged_source", place)[0], []
    layer = cut(make_layer(ScriptedRouter(), DISPATCHERS[dispatcher](place.meshes, chunks=2), shared=True), place)
    layer.router.script = script[place.rank]
    layer.experts.register_forward_hook(lambda module, args, out: Logged.apply(out, events, "experts"))
    layer.shared.register_forward_hook(lambda module, args, out: Logged.apply(out, events, "shared"))
    launch, wait = transfer._Ticket.launch, transfer._Ticket.wait
    transfer._Ticket.launch = lambda self, pending: (events.append("start"), launch(self, pending))[1]
    transfer._Ticket.wait = lambda self: (events.append("wait"), wait(self))[1]
    try:
        out = layer(random_batches([script])[0][place.rank].requires_grad_())
        forward = list(events)
        events.clear()
        out.sum().backward()
    finally:
        transfer._Ticket.launch, transfer._Ticket.wait = launch, wait
    chunk = ["wait"] * 3 + ["experts", "start"]  # row numbers, weights and rows arrive; the sums leave
    assert forward == ["start"] * 6 + ["shared"] + chunk * 2 + ["wait"] * 2, forward
    back = ["wait", "experts", "start", "start"]  # a gradient of sums arrives; those of rows and weights leave
    position = events.index("shared")
    assert events[:position] == ["start"] * 2 + back * 2, events
    assert events[position + 1 :] == ["wait"] * 4, events


@case
def compiled_equals_eager(place):
    if place.world > 2:
        return  # compiling takes long, and says the same
    script = workloads("ragged_source", place)[0]
    layer = cut(make_layer(ScriptedRouter(), AllToAllDispatcher(place.meshes, chunks=2), shared=True), place)
    layer.router.script = script[place.rank]
    x = random_batches([script])[0][place.rank]
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


@case
def dropped_assignments_are_counted_in_the_statistics(place):
    script = workloads("hot_rank", place)[0]
    layer = cut(make_layer(ScriptedRouter(), AllToAllDispatcher(place.meshes, capacity_factor=0.5)), place)
    layer.router.script = script[place.rank]
    statistics = RouterStatistics([0], E)
    layer(random_batches([script])[0][place.rank], StepContext(statistics=statistics))
    lost = int((~kept_by_hand(place, script, 0.5, 1)).sum())
    assert int(statistics.reduce(lambda t: t).dropped) == lost and (lost > 0 or place.ep == 1)


def run_all(folder):
    """In every rank: run all cases over all layouts, and write what failed."""
    torch.set_default_dtype(torch.float32)
    with running("cpu", timeout_s=60) as process:
        failures = {}
        for layout in LAYOUTS[process.world]:
            sizes = {"ep2": (2, 1), "ep4": (4, 1), "etp2": (1, 2), "ep2etp2": (2, 2)}[layout]
            meshes = meshes_of(Layout(ep=sizes[0], etp=sizes[1]), process)
            place = Place(process.world, process.rank, meshes)
            for name, (function, values) in CASES.items():
                try:
                    torch.manual_seed(0)
                    function(place, **values)
                except Exception:
                    failures[f"{layout}-{name}"] = traceback.format_exc()
        Path(folder, f"{process.rank}.json").write_text(json.dumps(failures))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("world", "layout"), [(world, layout) for world, layouts in LAYOUTS.items() for layout in layouts]
)
def test_dispatch(failures, world, layout, name):
    for rank, of_rank in enumerate(failures(world)):
        assert f"{layout}-{name}" not in of_rank, f"rank {rank}: {of_rank[f'{layout}-{name}']}"


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
