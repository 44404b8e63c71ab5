"""The private names of torch that Scatterfold uses, all of them, so that a new version of torch is tried in one place.

Written against torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, ProcessGroup, Store, _resolve_process_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor.placement_types import _StridedShard


def split_mesh(world: DeviceMesh, sizes: dict[str, int], real: set[str]) -> DeviceMesh:
    """Arrange the ranks of a 1-D mesh as a grid. Every rank must call it: it makes process groups.

    Several grids may be cut from one mesh; FSDP and tensor parallelism combine only meshes of the same origin.

    Args:
        sizes: of the dimensions by name, the last the fastest.
        real: dimensions along which ranks will communicate; the others get a group that does nothing and costs nothing.
    """
    # Registers the group that does nothing, under the name "fake".
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    unused: dict[str, str] = {name: "fake" for name in sizes if name not in real}
    return world._unflatten(0, tuple(sizes.values()), tuple(sizes), backend_override=unused)  # type: ignore[arg-type]


# How FSDP cuts a dimension that tensor or expert parallelism has cut before.
StridedShard = _StridedShard


def own_store(prefix: str) -> Store:
    """The key-value store through which the ranks met, over a connection that no other thread waits on."""
    return PrefixStore(prefix, _get_default_store().clone())  # type: ignore[reportAttributeAccessIssue]


# torch 2.13 has new names for them, and warns about the old ones.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def ring_attention() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and backward pass of torch's ring attention, with the order of `parallel.context.zigzag` on.

    Both take an operator for the attention of one pair of blocks, and tensors of (B, H, S, W).
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    ring._cp_options.enable_load_balance = True
    return ring._templated_ring_attention, ring._templated_ring_attention_backward


def group_by_name(name: str) -> ProcessGroup:
    """The process group that torch's functional collectives mean by a name."""
    return _resolve_process_group(name)  # type: ignore[reportArgumentType]


def in_backward() -> bool:
    """Whether autograd is computing a backward pass now, on this thread: a forward pass is then a recomputation."""
    return torch._C._current_graph_task_id() != -1


def set_group_timeouts(seconds: float) -> None:
    """Let collectives of every process group wait so long; torch gives new groups a time of its own choice."""
    from torch.distributed.distributed_c10d import _world

    for group in list(_world.pg_map):
        for device in group._device_types:
            backend = group._get_backend(device)
            if hasattr(backend, "_set_default_timeout"):  # the group that does nothing has none
                backend._set_default_timeout(timedelta(seconds=seconds))


def write_flight_record(path: Path) -> None:
    """Write what torch's flight recorder remembers of this process, as JSON."""
    from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[reportAttributeAccessIssue]

    path.write_bytes(_dump_fr_trace_json())
