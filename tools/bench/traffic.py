"""Bytes that a rank sends in collectives, seen where torch hands them to the backend."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...parallel.meshes import Meshes
from ...parallel.torch_private import group_by_name

# What a collective is for, by the file that asks for it; several purposes may use the very same group of ranks.
_BY_FILE = (
    ("/parallel/dispatchers/", "tokens"),
    ("/parallel/engines/", "gradients"),
    ("/distributed/fsdp/", "gradients"),
    ("/distributed/pipelining/", "pp"),
    ("/moe/routers/", "counts"),
    ("/parallel/tensor/", "sequence"),  # cp or tp, which the group tells
    ("/parallel/context/", "sequence"),
)
PURPOSES = ("gradients", "tokens", "tp", "cp", "pp", "counts", "other")


@dataclass(frozen=True)
class Sent:
    """One collective.

    Attributes:
        purpose: one of PURPOSES.
        collective: its kind.
        bytes: that this rank sends to others.
        shape, dtype: of the tensor handed over; None if there are several.
    """

    purpose: str
    collective: str
    bytes: int
    shape: torch.Size | None
    dtype: torch.dtype | None


class Traffic(TorchDispatchMode):
    """A context in which every collective of this thread, forward and backward, is listed with the bytes that it sends.

    Counted by the tensors themselves: what all-gather and reduce-scatter give to each other rank; of an all-reduce what
    a ring sends, 2 (n - 1) / n of the tensor; of all-to-all what is not for the rank itself; of a broadcast or a
    point-to-point send the tensor. Groups of one rank send nothing.
    """

    def __init__(self, meshes: Meshes) -> None:
        super().__init__()
        self.sent: list[Sent] = []
        self._cp = None if meshes.cp is None else meshes.cp.get_group().group_name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            self._count(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        if name not in _SENT:
            return
        kind, at, share = _SENT[name]
        group, handed = _group_of(args), args[at]
        ranks = dist.get_world_size(group)
        if ranks == 1:
            return
        purpose = _purpose(sys._getframe(1))
        if purpose == "sequence":
            purpose = "cp" if group.group_name == self._cp else "tp"
        sent = round(_bytes(handed) * share(args, ranks, dist.get_rank(group)))
        one = isinstance(handed, Tensor)
        self.sent.append(Sent(purpose, kind, sent, handed.shape if one else None, handed.dtype if one else None))


def _purpose(frame: FrameType | None) -> str:
    """What the innermost file of `_BY_FILE` on the stack is for."""
    while frame is not None:
        path = frame.f_code.co_filename.replace(os.sep, "/")
        for part, purpose in _BY_FILE:
            if part in path:
                return purpose
        frame = frame.f_back
    return "other"


def _group_of(args: Iterable[Any]) -> dist.ProcessGroup:
    """The process group among the arguments of a collective: an object, or for functional ones its name, the last."""
    given = list(args)
    for arg in given:
        if isinstance(arg, torch.ScriptObject):
            return dist.ProcessGroup.unbox(arg)
    return group_by_name(given[-1])


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


# What share of the tensor a rank sends, from (arguments, ranks, own rank).
Share = Callable[[tuple[Any, ...], int, int], float]


def _ring(args: tuple[Any, ...], ranks: int, rank: int) -> float:
    return 2 * (ranks - 1) / ranks


def _to_each(args: tuple[Any, ...], ranks: int, rank: int) -> float:
    return ranks - 1


def _all_but_own(args: tuple[Any, ...], ranks: int, rank: int) -> float:
    return (ranks - 1) / ranks


def _split(at: int) -> Share:
    """By the split sizes in argument `at`, equal ones if there are none."""

    def share(args: tuple[Any, ...], ranks: int, rank: int) -> float:
        splits = args[at]
        return 1 - splits[rank] / max(sum(splits), 1) if splits else (ranks - 1) / ranks

    return share


# By torch's name: kind, which argument is handed over, and the share of it that is sent.
_SENT: dict[str, tuple[str, int, Share]] = {
    "allreduce_": ("all-reduce", 0, _ring),
    "all_reduce": ("all-reduce", 0, _ring),
    "_allgather_base_": ("all-gather", 1, _to_each),
    "allgather_": ("all-gather", 1, _to_each),
    "all_gather_into_tensor": ("all-gather", 0, _to_each),
    "_reduce_scatter_base_": ("reduce-scatter", 1, _all_but_own),
    "reduce_scatter_tensor": ("reduce-scatter", 0, _all_but_own),
    "alltoall_base_": ("all-to-all", 1, _split(4)),
    "all_to_all_single": ("all-to-all", 0, _split(2)),
    "send": ("send", 0, lambda args, ranks, rank: 1.0),
}
