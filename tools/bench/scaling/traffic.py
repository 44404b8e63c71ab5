"""Bytes that a rank sends in collectives, seen where torch hands them to the backend."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ....parallel.meshes import Meshes
from ....parallel.torch_private import group_by_name

Key = tuple[str, str]  # purpose, collective

# What a collective is for, by the file that asks for it; several purposes may use the very same group of ranks.
_BY_FILE = (
    ("/parallel/dispatchers/", "tokens"),
    ("/parallel/engines/", "gradients"),
    ("/distributed/fsdp/", "gradients"),
    ("/distributed/pipelining/", "pp"),
    ("/moe/routers/", "counts"),
    ("/parallel/tensor.py", "sequence"),  # cp or tp, which the group tells
    ("/parallel/vocabulary.py", "sequence"),
    ("/parallel/context.py", "sequence"),
)
PURPOSES = ("gradients", "tokens", "tp", "cp", "pp", "counts", "other")


class Traffic(TorchDispatchMode):
    """A context in which every collective of this thread, forward and backward, is counted as bytes sent to others.

    Counted by the tensors themselves: what all-gather and reduce-scatter give to each other rank; of an all-reduce what
    a ring sends, 2 (n - 1) / n of the tensor; of all-to-all what is not for the rank itself; of a broadcast or a
    point-to-point send the tensor. Groups of one rank send nothing.
    """

    def __init__(self, meshes: Meshes) -> None:
        super().__init__()
        self.sent: Counter[Key] = Counter()
        self.calls: Counter[Key] = Counter()
        self._cp = None if meshes.cp is None else meshes.cp.get_group().group_name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            self._count(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        if name not in _SENT:
            return
        kind, measure = _SENT[name]
        group = _group_of(args)
        ranks = dist.get_world_size(group)
        if ranks == 1:
            return
        purpose = _purpose(sys._getframe(1))
        if purpose == "sequence":
            purpose = "cp" if group.group_name == self._cp else "tp"
        key = purpose, kind
        self.sent[key] += round(measure(args, ranks, dist.get_rank(group)))
        self.calls[key] += 1


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


# Collective, and bytes that one rank sends, from (arguments, ranks, own rank).
Measure = Callable[[tuple[Any, ...], int, int], float]


def _all_reduce(args: tuple[Any, ...], ranks: int, rank: int) -> float:
    return 2 * _bytes(args[0]) * (ranks - 1) / ranks


def _gather(at: int) -> Measure:
    return lambda args, ranks, rank: _bytes(args[at]) * (ranks - 1)


def _scatter(at: int) -> Measure:
    return lambda args, ranks, rank: _bytes(args[at]) * (ranks - 1) / ranks


def _exchange(at: int, splits_at: int) -> Measure:
    def measure(args: tuple[Any, ...], ranks: int, rank: int) -> float:
        splits = args[splits_at]
        own = splits[rank] / max(sum(splits), 1) if splits else 1 / ranks
        return _bytes(args[at]) * (1 - own)

    return measure


_SENT: dict[str, tuple[str, Measure]] = {
    "allreduce_": ("all-reduce", _all_reduce),
    "all_reduce": ("all-reduce", _all_reduce),
    "_allgather_base_": ("all-gather", _gather(1)),
    "allgather_": ("all-gather", _gather(1)),
    "all_gather_into_tensor": ("all-gather", _gather(0)),
    "_reduce_scatter_base_": ("reduce-scatter", _scatter(1)),
    "reduce_scatter_tensor": ("reduce-scatter", _scatter(0)),
    "alltoall_base_": ("all-to-all", _exchange(1, 4)),
    "all_to_all_single": ("all-to-all", _exchange(0, 2)),
    "send": ("send", lambda args, ranks, rank: _bytes(args[0])),
}
