"""Every rank sends each token once to each rank that holds one of its experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .exchange import ChunkSizes, ExchangingDispatcher, Handle, SentRows
from .rows import spread
from .tables import Plan, ReturnTable
from .transfer import exchange


class AllToAllDispatcher(ExchangingDispatcher):
    """Rows travel by all-to-all with uneven splits: as many as there are distinct (token, remote rank) pairs.

    Options as at `ExchangingDispatcher`. Over one rank it is the identity.
    """

    def send_rows(self, x: Tensor, plan: Plan, chunk: int, sizes: ChunkSizes) -> SentRows:
        blocks, arriving = sizes.pairs, sizes.arriving[:, 0]
        outgoing = self.for_each_rank(blocks.outgoing)
        token = self.copies(blocks.of(plan.tokens, plan.pairs, chunk, 0), blocks.outgoing)
        if blocks.first is None:
            first_sent = first = torch.arange(self.ranks, device=x.device, dtype=torch.int32) * blocks.incoming[0]
        else:
            first_sent, first = _starts(plan.pairs[chunk].repeat_interleave(self.etp)), _starts(arriving)
        present, place = (
            of_ep[chunk, :, : x.shape[0]].repeat_interleave(self.etp, 0) for of_ep in (plan.present, plan.place)
        )
        table = ReturnTable.of(present, place, first_sent, token, x.shape[0])
        message = exchange(spread(x, table), outgoing, blocks.incoming, self.group)
        return SentRows(message, first, Handle(outgoing, blocks.incoming, table))

    def row_numbers(self, plan: Plan) -> Tensor:
        return plan.row


def _starts(sizes: Tensor) -> Tensor:
    """Where each of several consecutive blocks begins, (P,) int32."""
    return pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))[:-1]
