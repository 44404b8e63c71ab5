"""What the dispatchers over several ranks share: plan, sizes, assignments, and the way back of the sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ...kernels import Routing
from ...kernels.errors import ConfigError
from ...kernels.untraced import untraced
from .base import Arrival, Dispatched, Pending, check_spread
from .local import LocalDispatcher
from .rows import collect, pick
from .tables import Limits, Plan, ReturnTable
from .transfer import Message, Splits, exchange

if TYPE_CHECKING:
    from ..meshes import Meshes


@dataclass(frozen=True)
class Blocks:
    """Blocks of one kind (rows of pairs, or assignments) of one chunk, in numbers that the host knows.

    Attributes:
        outgoing: (EP,) sizes of those that this rank makes, one per ep index; all its etp ranks get the same.
        incoming: (P,) sizes of those that it gets.
        first: where they start in the plan's list of all blocks; None where each is cut from it and padded.
    """

    outgoing: Splits
    incoming: Splits
    first: int | None

    def of(self, listed: Tensor, counts: Tensor, chunk: int, fill: int) -> Tensor:
        """The outgoing blocks one after the other, from a list of those of all chunks; counts (C, EP) are the sizes."""
        if self.first is not None:
            return listed[self.first :][: sum(self.outgoing)]
        start = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)[chunk]
        slot = torch.arange(self.outgoing[0], device=listed.device)
        index = (start[:, None] + slot).clamp_(max=max(listed.numel() - 1, 0))
        return torch.where(slot < counts[chunk][:, None], listed[index], fill).flatten()


@dataclass(frozen=True)
class ChunkSizes:
    """Sizes of one chunk.

    Attributes:
        pairs, assignments: of its blocks.
        arriving: (P, 1 + E / EP) int32 on the device: pairs from each rank, then assignments by expert.
        tokens: the most that any rank has in this chunk.
    """

    pairs: Blocks
    assignments: Blocks
    arriving: Tensor
    tokens: int


@dataclass(frozen=True)
class Handle:
    """How the sums of one chunk find their way back.

    Attributes:
        outgoing, incoming: rows of tokens for and from each rank; the sums take the same way back.
        table: which of the sums that come back belong to which token.
    """

    outgoing: Splits
    incoming: Splits
    table: ReturnTable


@dataclass(frozen=True)
class SentRows:
    """Rows of one chunk under way.

    Attributes:
        message: the rows.
        first: (P,) on the device, where those of each source begin.
        handle: their way back.
    """

    message: Message
    first: Tensor
    handle: Handle


class ExchangingDispatcher(ABC):
    """Base of the dispatchers that send tokens to other ranks; a subclass says how the rows travel.

    Who gets which tokens is decided where the tokens are. Beside the rows travel, for each (token, expert), the number
    of its row and its combine weight. They are in the order of the experts, so the counts say which expert is meant.

    Args:
        meshes: this rank's place; None, or a dispatch group of one rank, for no communication at all.
        capacity_factor: bounds what one rank sends to another: to this factor times the fair share of its assignments
            (`tables.Limits`). All buffers then have sizes that the host knows, and nothing waits for the device. A
            (token, ep index) pair that does not fit is dropped with all its assignments, later tokens first. Every
            rank of the group must have equally many tokens and slots for assignments. None drops nothing and exchanges
            the sizes, for which the host waits once per layer.
        chunks: into how many parts the tokens are cut; the experts compute one while others travel.

    Raises: ConfigError for a value out of range.
    """

    def __init__(self, meshes: Meshes | None = None, capacity_factor: float | None = None, chunks: int = 1) -> None:
        if capacity_factor is not None and not capacity_factor > 0:
            raise ConfigError(f"dispatcher.capacity_factor={capacity_factor} is out of range, allowed: null, above 0")
        if chunks < 1:
            raise ConfigError(f"dispatcher.chunks={chunks} is too small, allowed: 1 or more")
        self.capacity_factor, self.chunks = capacity_factor, chunks
        self.ep = self.etp = 1
        self._ep_index, self._rank = 0, 0
        self._group: dist.ProcessGroup | None = None
        if meshes is not None:
            self.ep, self.etp = meshes.layout.ep, meshes.layout.etp
            at = meshes.coordinates
            self._ep_index, self._rank = at.ep, at.ep * self.etp + at.etp
            self._group = meshes.dispatch_group
        self._alone = LocalDispatcher()

    @property
    def ranks(self) -> int:
        """P, ranks of the dispatch group."""
        return self.ep * self.etp

    @property
    def group(self) -> dist.ProcessGroup:
        assert self._group is not None  # asked for only where there is more than one rank
        return self._group

    def check(self, num_experts: int, expert_width: int) -> None:
        check_spread(num_experts, expert_width, self.ep, self.etp)

    def local_experts(self, num_experts: int) -> range:
        local = num_experts // self.ep
        return range(self._ep_index * local, (self._ep_index + 1) * local)

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        return self._alone.dispatch(x, routing) if self._group is None else self._dispatch(x, routing)

    def combine(self, partial: Tensor, arrival: Arrival) -> Pending[Tensor]:
        if self._group is None:
            return self._alone.combine(partial, arrival)
        return self._combine(partial, arrival.handle)

    @abstractmethod
    def send_rows(self, x: Tensor, plan: Plan, chunk: int, sizes: ChunkSizes) -> SentRows:
        """Start to send the rows of one chunk, x (its tokens, D), to all ranks that the plan names for them."""

    @abstractmethod
    def row_numbers(self, plan: Plan) -> Tensor:
        """For each assignment, (N,), which of the rows that its rank gets from here is its token."""

    @untraced
    def _dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        plan = Plan.of(routing, self.ep, self.chunks, self.capacity_factor)
        parts = x.split([plan.chunk_size(chunk) for chunk in range(self.chunks)])
        chunks, rows_sent = [], 0
        for chunk, (part, sizes) in enumerate(zip(parts, self._exchange_sizes(plan, routing))):
            assignments = self._send_assignments(routing.weight, plan, chunk, sizes)
            rows = self.send_rows(part, plan, chunk, sizes)
            outgoing = rows.handle.outgoing
            rows_sent += sum(outgoing) - outgoing[self._rank]
            chunks.append(Pending(partial(_arrive, rows, assignments, sizes)))
        return Dispatched(tuple(chunks), rows_sent, plan.dropped)

    @untraced
    def _combine(self, sums: Tensor, handle: Handle) -> Pending[Tensor]:
        message = exchange(sums, handle.incoming, handle.outgoing, self.group)
        return Pending(partial(_collect, message, handle.table))

    def _exchange_sizes(self, plan: Plan, routing: Routing) -> list[ChunkSizes]:
        """Tell every rank what it will get, of all chunks in one message; the host waits unless sizes are bounded."""
        tokens = [plan.chunk_size(chunk) for chunk in range(self.chunks)]
        token_counts = torch.stack([plan.pairs.new_full((self.ep, 1), count) for count in tokens])
        own = torch.cat([token_counts, plan.pairs[..., None], plan.assignments], -1)  # (C, EP, 2 + E / EP)
        own = own.transpose(0, 1).repeat_interleave(self.etp, 0).contiguous()
        found = torch.empty_like(own)
        dist.all_to_all_single(found, own, group=self.group)
        arriving = found.transpose(0, 1)  # (C, P, 2 + E / EP)
        if self.capacity_factor is None:
            return self._exact_sizes(plan, arriving)
        limits = [Limits.of_chunk(self.capacity_factor, routing, self.ep, plan.span, c) for c in range(self.chunks)]
        return [
            ChunkSizes(
                Blocks((limit.pairs,) * self.ep, (limit.pairs,) * self.ranks, None),
                Blocks((limit.assignments,) * self.ep, (limit.assignments,) * self.ranks, None),
                of_chunk[:, 1:],
                count,
            )
            for limit, of_chunk, count in zip(limits, arriving, tokens)
        ]

    def _exact_sizes(self, plan: Plan, arriving: Tensor) -> list[ChunkSizes]:
        """Read all sizes with one wait for the device."""
        outgoing = torch.stack([plan.pairs, plan.assignments.sum(-1)], 1)
        incoming = torch.stack([arriving[..., 0], arriving[..., 1], arriving[..., 2:].sum(-1)], 1)
        numbers = torch.cat([outgoing.flatten(1), incoming.flatten(1)], 1).tolist()
        sizes, first_pair, first_assignment = [], 0, 0
        for of_chunk, row in zip(arriving, numbers):
            pairs, assignments, rest = _split(row, self.ep, self.ep)
            tokens, arriving_pairs, arriving_assignments = _split(rest, self.ranks, self.ranks)
            sizes.append(
                ChunkSizes(
                    Blocks(pairs, arriving_pairs, first_pair),
                    Blocks(assignments, arriving_assignments, first_assignment),
                    of_chunk[:, 1:],
                    max(tokens),
                )
            )
            first_pair, first_assignment = first_pair + sum(pairs), first_assignment + sum(assignments)
        return sizes

    def _send_assignments(self, weight: Tensor, plan: Plan, chunk: int, sizes: ChunkSizes) -> tuple[Message, Message]:
        """Row and combine weight of each assignment of a chunk, in the order of the experts."""
        blocks = sizes.assignments
        source = blocks.of(plan.order, plan.assignments.sum(-1), chunk, weight.numel())
        outgoing = self.for_each_rank(blocks.outgoing)
        row = self.copies(pad(self.row_numbers(plan), (0, 1))[source], blocks.outgoing)
        own_weight = self.copies(pick(weight, source), blocks.outgoing)
        return (
            exchange(row, outgoing, blocks.incoming, self.group),
            exchange(own_weight, outgoing, blocks.incoming, self.group),
        )

    def copies(self, values: Tensor, sizes: Splits) -> Tensor:
        """One block for each rank from one for each ep index: its etp ranks all get the same."""
        if self.etp == 1:
            return values
        return torch.cat([block for block in values.split(list(sizes)) for _ in range(self.etp)])

    def for_each_rank(self, sizes: Splits) -> Splits:
        """The sizes of `copies`."""
        return tuple(size for size in sizes for _ in range(self.etp))


def _split(numbers: Sequence[int], first: int, second: int) -> tuple[Splits, Splits, Splits]:
    return tuple(numbers[:first]), tuple(numbers[first : first + second]), tuple(numbers[first + second :])


@untraced
def _arrive(rows: SentRows, assignments: tuple[Message, Message], sizes: ChunkSizes) -> Arrival:
    """Wait for a chunk and build the routing of its rows over the experts of this rank."""
    row, weight = (message.arrive() for message in assignments)
    counts = sizes.arriving[:, 1:].contiguous()  # (P, E / EP)
    ranks, local = counts.shape
    keep = None
    if sizes.assignments.first is not None:
        number = torch.arange(row.numel(), device=row.device, dtype=torch.int32)
        cell = torch.searchsorted(counts.flatten().cumsum(0, dtype=torch.int32), number, right=True)
        rank, expert = torch.div(cell, local, rounding_mode="floor"), cell % local
    else:
        slot = torch.arange(sizes.assignments.incoming[0], device=row.device, dtype=torch.int32)
        slot = slot.expand(ranks, -1).contiguous()
        expert = torch.searchsorted(counts.cumsum(1, dtype=torch.int32), slot, right=True).flatten()
        rank = torch.arange(ranks, device=row.device).repeat_interleave(slot.shape[1])
        keep = expert < local
        expert = torch.where(keep, expert, 0)
    num_rows = sum(rows.handle.incoming)
    routing = Routing.from_assignments(rows.first[rank] + row, expert, weight, num_rows, local, keep)
    return Arrival(rows.message.arrive(), routing, rows.handle)


@untraced
def _collect(message: Message, table: ReturnTable) -> Tensor:
    return collect(message.arrive(), table)
