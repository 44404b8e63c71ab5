"""Choosing experts: exact top-k, group-limited selection."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_SCORES = ("max", "top2_sum")


def top_experts(scores_TE: Tensor, top_k: int) -> Tensor:
    """Ids of the `top_k` highest scores of each token, best first, ties broken by the lowest expert id.

    `torch.topk` promises no order among equal values, and a stable sort of all E is several times slower. So float32
    scores become integers of the same order, the expert id is appended as lowest digit, and all keys are distinct.

    Shapes: (T, E) floating point -> (T, top_k) int64.
    """
    if scores_TE.dtype != torch.float32:
        return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    num_experts = scores_TE.shape[-1]
    bits = (scores_TE + 0.0).view(torch.int32)  # + 0.0: minus zero becomes zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    reversed_ids = torch.arange(num_experts - 1, -1, -1, device=scores_TE.device)
    keys = (ordered * num_experts + reversed_ids).topk(top_k, dim=-1).values
    return num_experts - 1 - keys.remainder(num_experts)


def mask_groups(scores_TE: Tensor, num_groups: int, top_groups: int, group_score: str) -> Tensor:
    """Scores with minus infinity outside the `top_groups` best groups of E / num_groups neighbouring experts.

    A group counts by its best expert (DeepSeek-V2, 2405.04434, section 2.2.2) or by the sum of its two best
    (DeepSeek-V3, 2412.19437, section 2.1.2). Minus infinity and not zero, because scores with a bias may be negative.
    """
    grouped_TGe = scores_TE.unflatten(-1, (num_groups, -1))
    best_of_group = 1 if group_score == "max" else 2
    group_TG = grouped_TGe.topk(best_of_group, dim=-1).values.sum(-1)
    open_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, top_experts(group_TG, top_groups), True)
    return grouped_TGe.masked_fill(~open_TG[..., None], -torch.inf).flatten(-2)
