"""Routing: which token goes to which expert with what weight, as a sorted sparse list."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .availability import builds_tables


@dataclass(frozen=True)
class Routing:
    """A sparse (token, expert) matrix with a variable number of experts per token.

    N may be an upper bound: only the first `expert_offsets[E]` assignments count, the rest is padding that no
    kernel reads. So a router whose true count is known only on the device needs no host synchronisation.

    Where the Triton kernels serve the experts, they build the tables too: a counting sort in two launches for slots, a
    count of bits in three for a list. Elsewhere torch sorts. Both give the same bits.

    Attributes:
        token: (N,) int32, token of each assignment; sorted by expert, stable by token.
        weight: (N,) floating point, combine weight of each assignment; differentiable.
        expert_offsets: (E + 1,) int32, the assignments of expert e are [expert_offsets[e], expert_offsets[e + 1]).
        assignment: (N,) int32, the same list seen by token: the assignments of token t are
            assignment[token_offsets[t] : token_offsets[t + 1]], in ascending order of expert.
        token_offsets: (T + 1,) int32.
    """

    token: Tensor
    weight: Tensor
    expert_offsets: Tensor
    assignment: Tensor
    token_offsets: Tensor

    @property
    def num_tokens(self) -> int:
        return self.token_offsets.numel() - 1

    @property
    def num_experts(self) -> int:
        return self.expert_offsets.numel() - 1

    @property
    def counts(self) -> Tensor:
        """Assignments of each expert, (E,) int32."""
        return self.expert_offsets.diff()

    def with_weight(self, weight: Tensor) -> Routing:
        """The same routing with other combine weights, (N,), in the order of `token`."""
        return replace(self, weight=weight)

    @classmethod
    def from_topk(cls, experts: Tensor, weights: Tensor, num_experts: int, keep: Tensor | None = None) -> Routing:
        """Routing of a router that fills up to K slots per token.

        Args:
            experts: (T, K) integer, distinct expert ids of each token, in [0, num_experts).
            weights: (T, K) floating point, combine weights; gradients flow back to it.
            num_experts: E.
            keep: (T, K) bool, slots that count; None for all. Those that do not count become padding at the end.
        """
        if builds_tables(experts.device):
            from .triton_backend.routing import routing_tables  # imports triton

            return cls._from_tables(weights.flatten(), *routing_tables(experts, num_experts, keep))
        num_tokens, top_k = experts.shape
        slots = experts if keep is None else torch.where(keep, experts, num_experts)
        # Slots lie in order of tokens, so one stable sort by expert is enough, and short keys are sorted faster.
        sorted_expert, order = slots.flatten().to(_narrow_int(num_experts)).sort(stable=True)
        position = torch.empty_like(order).index_copy_(0, order, torch.arange(order.numel(), device=order.device))
        position = position.view(num_tokens, top_k).sort(dim=-1).values  # ascending expert; padding last
        if keep is None:
            assignment = position.flatten()
            token_offsets = torch.arange(num_tokens + 1, device=experts.device, dtype=torch.int32) * top_k
        else:
            assignment, token_offsets = _compact(position, keep.sum(-1))
        return cls(
            token=torch.div(order, max(top_k, 1), rounding_mode="floor").to(torch.int32),
            weight=_Permute.apply(weights.flatten(), order),
            expert_offsets=_offsets(sorted_expert, num_experts),
            assignment=assignment.to(torch.int32),
            token_offsets=token_offsets,
        )

    @classmethod
    def from_assignments(
        cls,
        token: Tensor,
        expert: Tensor,
        weight: Tensor,
        num_tokens: int,
        num_experts: int,
        keep: Tensor | None = None,
    ) -> Routing:
        """Routing from a list of assignments in any order.

        Args:
            token, expert: (N,) integer; a pair must not occur twice.
            weight: (N,) floating point; gradients flow back to it.
            num_tokens, num_experts: T and E.
            keep: (N,) bool, assignments that count; None for all. Those that do not count become padding at the
                end, so that no device value has to be known by the host.
        """
        if builds_tables(token.device):
            from .triton_backend.listed_routing import listed_routing_tables  # imports triton

            tables = listed_routing_tables(token, expert, num_tokens, num_experts, keep)
            return cls._from_tables(weight, *tables)
        padding = num_experts * num_tokens
        key = expert.to(torch.int64) * num_tokens + token
        if keep is not None:
            key = torch.where(keep, key, padding)
        by_expert = key.to(_narrow_int(padding)).argsort(stable=True)
        sorted_expert = expert[by_expert]
        sorted_token = token[by_expert]
        by_token_key = sorted_token
        if keep is not None:
            kept = keep[by_expert]
            sorted_expert = torch.where(kept, sorted_expert, num_experts)
            by_token_key = torch.where(kept, sorted_token, num_tokens)
        # Stable: ascending expert within a token.
        sorted_by_token, by_token = by_token_key.to(_narrow_int(num_tokens)).sort(stable=True)
        return cls(
            token=sorted_token.to(torch.int32),
            weight=_Permute.apply(weight, by_expert),
            expert_offsets=_offsets(sorted_expert, num_experts),
            assignment=by_token.to(torch.int32),
            token_offsets=_offsets(sorted_by_token, num_tokens),
        )

    @classmethod
    def _from_tables(
        cls,
        weight: Tensor,
        token: Tensor,
        order: Tensor,
        expert_offsets: Tensor,
        assignment: Tensor,
        token_offsets: Tensor,
    ) -> Routing:
        """From tables that the device has built; `weight` in the order of the caller."""
        return cls(token, _Permute.apply(weight, order), expert_offsets, assignment, token_offsets)


def _narrow_int(largest: int) -> torch.dtype:
    """The shortest integer type for ids up to `largest`; sorting time grows with the width of the keys."""
    return torch.int16 if largest < 2**15 else torch.int32 if largest < 2**31 else torch.int64


def _offsets(sorted_ids: Tensor, size: int) -> Tensor:
    """Start of each id in a sorted list, and the end: (size + 1,) int32."""
    ids = torch.arange(size + 1, device=sorted_ids.device, dtype=sorted_ids.dtype)
    return torch.searchsorted(sorted_ids, ids, out_int32=True)


def _compact(position: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """List the first `kept[t]` entries of each row one after the other, and all others behind them.

    Shapes: position (T, K), kept (T,) -> (T * K,), and the start of each row in it (T + 1,) int32.
    """
    num_tokens, top_k = position.shape
    column = torch.arange(top_k, device=position.device)
    end = kept.cumsum(0)
    start = end - kept
    row = torch.arange(num_tokens, device=position.device)[:, None] * top_k
    others = kept.sum() + row - end[:, None]  # where the rest of a row goes, less its column
    place = torch.where(column < kept[:, None], start[:, None], others) + column
    assignment = torch.empty_like(position).flatten().index_copy_(0, place.flatten(), position.flatten())
    return assignment, torch.nn.functional.pad(end, (1, 0)).to(torch.int32)


class _Permute(torch.autograd.Function):
    """values[order] for a permutation: its backward is a plain scatter, deterministic and without atomics."""

    @staticmethod
    def forward(ctx, values: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return values[order]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        return torch.empty_like(grad).index_copy_(0, order, grad), None
