"""Every rank gets all tokens and computes those of its own experts."""

from __future__ import annotations

import torch
from torch import Tensor

from .exchange import ChunkSizes, ExchangingDispatcher, Handle, SentRows
from .rows import total
from .tables import Plan, ReturnTable
from .transfer import gather


class AllGatherDispatcher(ExchangingDispatcher):
    """Rows travel by all-gather, and their sums back by a direct reduce-scatter.

    Each rank sends every token to all others: more bytes than all-to-all unless nearly every token has experts on
    nearly every rank, but one message of equal parts, and no row is copied to be sent. The assignments travel as with
    all-to-all, only to the rank of their expert. Sums come back one row per (token, rank), zeros included, and are
    added where the token is, in float32 and in the order of the ranks: as many bytes as a ring reduce-scatter, the same
    bits as all-to-all.

    Options as at `ExchangingDispatcher`; of ranks with fewer tokens than others the parts are padded.
    """

    def send_rows(self, x: Tensor, plan: Plan, chunk: int, sizes: ChunkSizes) -> SentRows:
        span = sizes.tokens
        token = torch.arange(span, device=x.device)
        present = plan.present[chunk, :, : x.shape[0]].repeat_interleave(self.etp, 0)
        first = torch.arange(self.ranks, device=x.device, dtype=torch.int32) * span
        table = ReturnTable.of(present, token[: x.shape[0]].expand_as(present), first, token.repeat(self.ranks), span)
        message = gather(x, span, self.ranks, self.group, lambda grad: total(grad, table))
        splits = (span,) * self.ranks
        return SentRows(message, first, Handle(splits, splits, table))

    def row_numbers(self, plan: Plan) -> Tensor:
        return plan.token
