"""What is measured: a layer, a routing, and what it must send."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.case import draw_experts
from ..kernels.shapes import Shape

ROUTINGS = ("balanced", "uniform", "zipf", "hot_rank")


def draw(routing: str, shape: Shape, ep: int, seed: int, rank: int) -> Tensor:
    """Experts of the tokens of one rank, (T, K) on the CPU.

    hot_rank: all of them among the experts of ep index 0, as far as it has enough; the rest as in `draw_experts`.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    if routing != "hot_rank":
        return draw_experts(routing, shape.tokens, shape.experts, shape.top_k, generator)
    preference = torch.rand(shape.tokens, shape.experts, generator=generator)
    preference[:, : shape.experts // ep] += 1.0
    return preference.topk(shape.top_k, dim=-1).indices


def remote_pairs(experts: Tensor, num_experts: int, ep: int, etp: int, ep_index: int) -> int:
    """Distinct pairs of a token and another rank that holds one of its experts, or a slice of it."""
    holders = torch.zeros(experts.shape[0], ep, dtype=torch.bool)
    holders.scatter_(1, experts // (num_experts // ep), True)
    return int(holders.sum()) * etp - int(holders[:, ep_index].sum())


def remote_copies(experts: Tensor, num_experts: int, ep: int, etp: int, ep_index: int) -> int:
    """The same if a token were sent once for each of its experts."""
    own = experts // (num_experts // ep) == ep_index
    return experts.numel() * etp - int(own.sum())
