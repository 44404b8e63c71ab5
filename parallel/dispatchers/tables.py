"""Index tables of a dispatch, from a routing alone: nothing here communicates or waits for the device.

Tokens are cut into C chunks of `span` consecutive ones. A *pair* is a token and an ep index that holds at least one of
its experts; a *block* is all that one chunk sends to one ep index: its pairs in the order of tokens, and its
assignments in the order of experts, then tokens. All etp ranks of an ep index get the same block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...kernels import Routing


@dataclass(frozen=True)
class Limits:
    """Largest sizes of a block, the same for every ep index: a buffer of a size that the host knows.

    Of the pairs, those of earlier tokens are kept; a pair is kept with all its assignments or not at all.
    """

    pairs: int
    assignments: int

    @classmethod
    def of_chunk(cls, factor: float, routing: Routing, ep: int, span: int, chunk: int) -> Limits:
        """The fair share of an ep index in the N assignments of a chunk, times a factor, up to what can be needed.

        N counts the slots of the routing, also those that are padding: what is used is known on the device only.
        """
        num_tokens, count = routing.num_tokens, routing.token.numel()
        size = min(max(num_tokens - chunk * span, 0), span)
        fair = math.ceil(factor * count * size / max(num_tokens, 1) / ep - 1e-9)
        needed = min(fair, count, size * (routing.num_experts // ep))
        return cls(min(needed, size), needed)


@dataclass(frozen=True)
class Plan:
    """Who gets what, for all chunks.

    Attributes:
        num_tokens: T.
        span: tokens of a chunk; the last chunks may be shorter or empty.
        present: (C, EP, span) bool, pairs that are sent.
        place: (C, EP, span) int32, number of a pair within its block.
        pairs: (C, EP) int32, how many.
        tokens: tokens of the pairs, block after block, each counted from the start of its chunk; padding behind.
        assignments: (C, EP, E / EP) int32, how many, by expert.
        order: (N,) int64, assignments block after block; those that are not sent behind.
        row, token: (N,) int32, for each assignment the place of its pair, and its token counted from the start of its
            chunk; unspecified for those not sent.
        dropped: () int64, assignments beyond the limits; None without limits.
    """

    num_tokens: int
    span: int
    present: Tensor
    place: Tensor
    pairs: Tensor
    tokens: Tensor
    assignments: Tensor
    order: Tensor
    row: Tensor
    token: Tensor
    dropped: Tensor | None

    @classmethod
    def of(cls, routing: Routing, ep: int, chunks: int = 1, factor: float | None = None) -> Plan:
        """Plan the dispatch of a routing over all experts.

        Args:
            factor: bounds every block by `Limits.of_chunk`; None for as much as there is.
        """
        num_tokens, num_experts, count = routing.num_tokens, routing.num_experts, routing.token.numel()
        local, device = num_experts // ep, routing.token.device
        span = -(-num_tokens // chunks)
        token = routing.token.long()
        index = torch.arange(count, device=device, dtype=torch.int32)
        expert = torch.searchsorted(routing.expert_offsets[1:], index, right=True)  # E for padding
        is_sent = expert < num_experts
        chunk = torch.div(token, max(span, 1), rounding_mode="floor")
        pair = (chunk * ep + expert // local) * span + token - chunk * span
        nowhere = chunks * ep * span
        load = torch.zeros(nowhere + 1, dtype=torch.int32, device=device)
        load.scatter_add_(0, torch.where(is_sent, pair, nowhere), torch.ones_like(index))
        load = load[:-1].view(chunks, ep, span)
        present, dropped = load > 0, None
        if factor is not None:
            present &= _within(load, [Limits.of_chunk(factor, routing, ep, span, number) for number in range(chunks)])
            kept = is_sent & pad(present.flatten(), (0, 1))[torch.where(is_sent, pair, nowhere)]
            dropped, is_sent = is_sent.sum() - kept.sum(), kept
        place = (present.cumsum(-1) - 1).to(torch.int32)
        block = torch.where(is_sent, chunk * num_experts + expert, chunks * num_experts)
        assignments = torch.zeros(chunks * num_experts + 1, dtype=torch.int32, device=device)
        assignments.scatter_add_(0, block, torch.ones_like(index))
        order = index.long() if chunks == 1 and factor is None else block.argsort(stable=True)
        return cls(
            num_tokens,
            span,
            present,
            place,
            present.sum(-1, dtype=torch.int32),
            _listed(present, torch.arange(span, device=device).expand_as(present)),
            assignments[:-1].view(chunks, ep, local),
            order,
            pad(place.flatten(), (0, 1))[torch.where(is_sent, pair, nowhere)],
            (token - chunk * span).to(torch.int32),
            dropped,
        )

    def chunk_size(self, chunk: int) -> int:
        """Tokens of a chunk."""
        return min(max(self.num_tokens - chunk * self.span, 0), self.span)


@dataclass(frozen=True)
class ReturnTable:
    """Which rows of a message belong to which token of a chunk of T tokens.

    Attributes:
        span: what `token` counts: T, or more where a message is padded.
        token: (R,) int64, token of each row.
        rows: (R,) int32, rows of each token in the order of the ranks: those of token t are
            rows[offsets[t] : offsets[t + 1]]. What is padding is in none.
        offsets: (T + 1,) int32.
    """

    span: int
    token: Tensor
    rows: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, present: Tensor, place: Tensor, first: Tensor, token: Tensor, span: int) -> ReturnTable:
        """From the pairs of a chunk.

        Args:
            present, place: (P, T), which rank has a row for which token, and where in its block.
            first: (P,), first row of each rank's block.
        """
        present = present.T
        row = (first + place.T).to(torch.int32)
        offsets = pad(present.sum(-1).cumsum(0), (1, 0)).to(torch.int32)
        return cls(span, token, _listed(present, row)[: token.numel()], offsets)


def _within(load: Tensor, limits: list[Limits]) -> Tensor:
    """Pairs that fit, (C, EP, span) bool: a prefix of each block's tokens."""
    fits = [
        ((of_chunk > 0).cumsum(-1) <= limit.pairs) & (of_chunk.cumsum(-1) <= limit.assignments)
        for of_chunk, limit in zip(load, limits)
    ]
    return torch.stack(fits)


def _listed(chosen: Tensor, values: Tensor) -> Tensor:
    """The values where `chosen` is true, in order, and zeros behind: as many as there are elements, flat."""
    flat = chosen.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, flat.numel())
    out = torch.zeros(flat.numel() + 1, dtype=values.dtype, device=values.device)
    return out.scatter_(0, place, values.flatten())[:-1]
