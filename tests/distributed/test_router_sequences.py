"""Routers whose ranks hold parts of the same sequences: losses and drops are those of whole sequences."""

import itertools
import json
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from meshes_of import meshes_of

from scatterfold.moe.context import StepContext
from scatterfold.moe.inject import inject_gradient
from scatterfold.moe.routers import ThresholdRouter, TopKRouter
from scatterfold.parallel import Layout
from scatterfold.parallel.process import running

pytestmark = pytest.mark.distributed

B, S, D, E, K = 3, 16, 6, 5, 2
LAYOUTS = {"cp2": (2, 1), "tp2": (1, 2), "cp4": (4, 1), "tp4": (1, 4), "cp2tp2": (2, 2)}
LOSSES = ["balance_micro_batch", "balance_sequence", "balance_global_batch", "z_loss"]
CAPACITY = {"capacity_factor": 0.6, "min_capacity": 1}
ROUTERS = {
    **{loss: lambda loss=loss: TopKRouter(D, E, K, **{loss: 0.5}) for loss in LOSSES},
    "bias": lambda: TopKRouter(D, E, K, bias_rate=0.1, balance_sequence=0.5),
    "position": lambda: TopKRouter(D, E, K, drop="position", balance_sequence=0.5, **CAPACITY),
    "probability": lambda: TopKRouter(D, E, K, drop="probability", **CAPACITY),
    "threshold": lambda: ThresholdRouter(D, E, 0.6, 3, drop="position", **CAPACITY),
    "threshold_probability": lambda: ThresholdRouter(D, E, 0.6, 3, drop="probability", **CAPACITY),
}
WORLDS = {2: ["cp2", "tp2"], 4: ["cp4", "tp4", "cp2tp2"]}


def positions(cp, tp, at):
    """Positions in the sequence that a rank holds: its two zigzag chunks, of which it takes its tp piece."""
    size = S // (2 * cp) if cp > 1 else S
    chunks = [list(range(n * size, (n + 1) * size)) for n in ([at.cp, 2 * cp - 1 - at.cp] if cp > 1 else [0])]
    held = sum(chunks, [])
    piece = len(held) // tp
    return held[at.tp * piece : (at.tp + 1) * piece]


def decisions(routing):
    """{(token, expert)} that the routing keeps."""
    used = routing.expert_offsets.tolist()
    return {(int(routing.token[n]), e) for e in range(E) for n in range(used[e], used[e + 1])}


def compare(process, name, layout):
    cp, tp = LAYOUTS[layout]
    meshes = meshes_of(Layout(cp=cp, tp=tp), process)
    hidden = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden[:, :, 0] += 1.0  # so that some experts are wanted more
    mine = positions(cp, tp, meshes.coordinates)
    results = []
    for is_part in (False, True):
        torch.manual_seed(0)
        router = ROUTERS[name]().double()
        with torch.no_grad():
            router.weight.normal_()
            if name == "bias":
                router.expert_bias.uniform_(-0.5, 0.5)
            if name == "balance_global_batch":
                router.finish_step(torch.tensor([5, 1, 7, 2, 3]))
        x = hidden[:, mine].flatten(0, 1) if is_part else hidden.flatten(0, 1)
        group = {"sequence_group": meshes.sequence_group, "cp": cp} if is_part else {}
        routed = router(x, StepContext(num_sequences=B, **group))
        carrier = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for loss in routed.losses.values():
            carrier = inject_gradient(carrier, loss, len(x) / (B * S))
        if routed.losses:
            carrier.backward()
        loss = sum(loss.detach() * len(x) / (B * S) for loss in routed.losses.values()) + torch.zeros(())
        grad = torch.zeros_like(router.weight) if router.weight.grad is None else router.weight.grad
        results.append([loss, grad, routed.counts.clone(), routed.dropped.clone(), routed])
    whole, part = results
    for ours in part[:4]:
        dist.all_reduce(ours)
    for ours, expected in zip(part[:4], whole[:4]):
        torch.testing.assert_close(ours, expected)
    kept = decisions(whole[4].routing)
    own = {b * S + s: b * len(mine) + n for b in range(B) for n, s in enumerate(mine)}
    assert decisions(part[4].routing) == {(own[token], e) for token, e in kept if token in own}
    if name in ("position", "probability", "threshold", "threshold_probability"):
        assert int(whole[3]) > 0


def run_all(folder):
    with running("cpu", timeout_s=60) as process:
        failures = {}
        for layout, name in itertools.product(WORLDS[process.world], ROUTERS):
            try:
                compare(process, name, layout)
            except Exception:
                failures[f"{layout}-{name}"] = traceback.format_exc()
        Path(folder, f"{process.rank}.json").write_text(json.dumps(failures))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize(("world", "layout"), [(w, layout) for w, layouts in WORLDS.items() for layout in layouts])
def test_parts_decide_as_the_whole(failures, world, layout, name):
    for rank, of_rank in enumerate(failures(world)):
        assert f"{layout}-{name}" not in of_rank, f"rank {rank}: {of_rank[f'{layout}-{name}']}"


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
