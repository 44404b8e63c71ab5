"""Bytes that a rank sends in one optimizer step by formula, by what they are for; mean over the ranks.

w bytes an element of activations and gathered parameters, gradients in float32; t = tokens of a micro-batch on a cp
rank, m micro-batches, L layers on a stage, all of them with experts.

    gradients   copies sum them, 2 x 4 N (n - 1) / n; shards gather parameters, m w N (z - 1) / z for what stays
                gathered (embedding, head) and twice that for blocks, and scatter gradients once, 4 N (z - 1) / z
    tokens      rows to experts and sums back, forward and backward: 4 m L t / tp x D w for each remote rank of a token
    tp          two gathers and two scatters of t D w (tp - 1) / tp in each block, and as many at the two ends together
    cp          keys and values gathered, and their gradients scattered: 2 x 2 t G d w (cp - 1) in each block
    pp          t / tp x D w forward and backward over each of pp - 1 boundaries
"""

from __future__ import annotations

from math import comb

from ....parallel.layout import ResolvedLayout
from .case import Model


def expected(model: Model, layout: ResolvedLayout, element_bytes: int) -> dict[str, float]:
    """Bytes by purpose; the few that count tokens or sum norms are left out."""
    per_rank = model.sequences // layout.data // model.micro_batches
    tokens = per_rank * model.length / layout.cp
    layers, batches = model.layers / layout.pp, model.micro_batches
    row = model.width * element_bytes
    attention = 2.0 * tokens * model.width * element_bytes * (layout.cp - 1)  # keys and values, one way
    return {
        "gradients": _gradients(model, layout, element_bytes),
        "tokens": 4 * batches * layers * tokens / layout.tp * row * remote_ranks(model, layout),
        "tp": batches * (4 * layers + 4 / layout.pp) * tokens * row * (layout.tp - 1) / layout.tp,
        "cp": batches * layers * 2 * attention / layout.tp,
        "pp": batches * 2 * tokens / layout.tp * row * (layout.pp - 1) / layout.pp,
    }


def remote_ranks(model: Model, layout: ResolvedLayout) -> float:
    """Other ranks that a token goes to if the router spreads tokens evenly: distinct ones, times the slices of each."""
    ep, rest = layout.ep, model.experts - model.experts // layout.ep
    holders = ep * (1 - comb(rest, model.top_k) / comb(model.experts, model.top_k))
    return holders * layout.etp - holders / ep


def _gradients(model: Model, layout: ResolvedLayout, element_bytes: int) -> float:
    width, layers = model.width, model.layers / layout.pp
    cut_by_tp = layers * 4 * width**2
    shared = layers * (2 * width + model.experts * width)
    ends = 2 * model.vocabulary * width / layout.pp
    experts = layers * model.experts * 3 * width * model.expert_width / (layout.ep * layout.etp)
    if layout.dp_shard == 1:
        copies = layout.dp_replicate * layout.cp
        return _sum((cut_by_tp + ends) / layout.tp, copies) + _sum(shared, layout.stage) + _sum(experts, layout.edp)
    shards, gathers = layout.dp_shard * layout.cp, 2 * model.micro_batches * element_bytes
    fully = cut_by_tp / layout.tp + (shared if layout.tp == 1 else 0)
    summed = 0.0 if layout.tp == 1 else _sum(shared, layout.stage)
    return (
        summed
        + _sharded(fully, shards, layout.dp_replicate, gathers)
        + _sharded(ends / layout.tp, shards, layout.dp_replicate, gathers / 2)
        + _sharded(experts, layout.edp_shard, layout.edp_replicate, gathers)
    )


def _sum(elements: float, ranks: int) -> float:
    return 2 * 4 * elements * (ranks - 1) / ranks


def _sharded(elements: float, shards: int, copies: int, gathered_bytes: float) -> float:
    return (gathered_bytes + 4) * elements * (shards - 1) / shards + _sum(elements / shards, copies)
