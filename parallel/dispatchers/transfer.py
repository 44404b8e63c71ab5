"""Messages between ranks that are under way while the program goes on, in the forward and in the backward pass.

A message is two autograd nodes. The first launches it and makes the buffer that it will fill, the second waits. In the
backward pass the second node, which runs first, launches the gradient on its way back, and the first one waits for it.
Autograd runs what was called later first, so whatever was computed between start and arrival is computed between the
launch and the wait of the gradient too.

The two nodes share a ticket with the work in progress. Nothing else may read the buffer in between. On CUDA a wait
holds up the stream and not the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ..torch_private import all_gather_single

Splits = tuple[int, ...]
Launch = Callable[[Tensor], tuple[Tensor, dist.Work]]  # what is sent -> the buffer that fills, the work in progress


@dataclass(frozen=True)
class Message:
    """A tensor on its way."""

    _buffer: Tensor
    _ticket: _Ticket

    def arrive(self) -> Tensor:
        """Wait for the tensor. To be called once."""
        return _Arrive.apply(self._buffer, self._ticket)


def exchange(x: Tensor, outgoing: Splits, incoming: Splits, group: dist.ProcessGroup) -> Message:
    """Send the first outgoing[0] rows of x to rank 0, the next outgoing[1] to rank 1, and so on.

    Shapes: x (sum of outgoing, ...) -> (sum of incoming, ...), in the order of the ranks.
    """
    return _start(
        x,
        lambda rows: _all_to_all(rows, outgoing, incoming, group),
        lambda grad: _all_to_all(grad, incoming, outgoing, group),
        lambda grad: grad,
    )


def gather(x: Tensor, rows: int, ranks: int, group: dist.ProcessGroup, total: Callable[[Tensor], Tensor]) -> Message:
    """Send x to all ranks: (N, ...) -> (ranks * rows, ...), with rows - N rows of zeros behind each part.

    Args:
        rows: the largest N of any rank.
        total: what of the gradients (ranks * rows, ...) that the ranks send back is the gradient of x.
    """
    equal = (rows,) * ranks
    return _start(
        x, lambda x: _all_gather(x, rows, ranks, group), lambda grad: _all_to_all(grad, equal, equal, group), total
    )


class _Ticket:
    """How the gradient of a message travels, and the work in progress, of either direction."""

    def __init__(self, send_back: Launch, total: Callable[[Tensor], Tensor]) -> None:
        self.send_back, self.total = send_back, total
        self._pending: tuple[Tensor, dist.Work] | None = None

    def launch(self, pending: tuple[Tensor, dist.Work]) -> Tensor:
        self._pending = pending
        return pending[0]

    def wait(self) -> Tensor:
        assert self._pending is not None, "a message arrives once"
        buffer, work = self._pending
        work.wait()
        self._pending = None
        return buffer


def _start(x: Tensor, send: Launch, send_back: Launch, total: Callable[[Tensor], Tensor]) -> Message:
    ticket = _Ticket(send_back, total)
    return Message(_Start.apply(x, ticket, send), ticket)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ticket: _Ticket, send: Launch) -> Tensor:
        ctx.ticket = ticket
        return ticket.launch(send(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, _: Tensor):
        return ctx.ticket.total(ctx.ticket.wait()), None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer: Tensor, ticket: _Ticket) -> Tensor:
        ctx.ticket = ticket
        ticket.wait()
        return buffer.view_as(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        ctx.ticket.launch(ctx.ticket.send_back(grad))
        return grad, None  # only tells autograd to go on: what the buffer's node hands on arrives by the ticket


def _all_to_all(x: Tensor, outgoing: Splits, incoming: Splits, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    buffer = x.new_empty(sum(incoming), *x.shape[1:])
    work = dist.all_to_all_single(buffer, x.contiguous(), list(incoming), list(outgoing), group=group, async_op=True)
    assert work is not None
    return buffer, work


def _all_gather(x: Tensor, rows: int, ranks: int, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    x = x.contiguous() if x.shape[0] == rows else pad(x, (0, 0, 0, rows - x.shape[0]))
    buffer = x.new_empty(ranks * rows, *x.shape[1:])
    work = all_gather_single(buffer, x, group=group, async_op=True)
    assert work is not None
    return buffer, work
