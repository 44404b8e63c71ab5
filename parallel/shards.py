"""Which part of a distributed tensor this rank holds."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .torch_private import StridedShard


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, which gradients flow through; a plain tensor is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_dimensions(tensor: Tensor) -> list[int]:
    """Dimensions of the mesh along which ranks hold different parts."""
    if not isinstance(tensor, DTensor):
        return []
    return [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Shard | StridedShard)]


def parts(tensor: Tensor) -> int:
    """Into how many parts the whole is cut, each of its elements in one of them."""
    count = 1
    for dim in cut_dimensions(tensor):
        count *= tensor.device_mesh.size(dim)  # type: ignore[union-attr]
    return count


def local_range(tensor: Tensor, dim: int) -> range:
    """The indices of dimension `dim` of the whole tensor that this rank holds.

    Tensor and expert parallelism cut first, then FSDP what they left, whichever stands first in the mesh: then FSDP's
    placement is a strided shard, so those come last here.
    """
    size = tensor.shape[dim]
    if not isinstance(tensor, DTensor):
        return range(size)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    dims = [at for at in cut_dimensions(tensor) if tensor.placements[at].dim % tensor.ndim == dim]  # type: ignore[attr-defined]
    strided = [at for at in dims if isinstance(tensor.placements[at], StridedShard)]
    held = range(size)
    for at in [at for at in dims if at not in strided] + strided[::-1]:
        length = -(-len(held) // tensor.device_mesh.size(at))  # as torch.chunk: the last parts may be short or empty
        held = held[coordinate[at] * length : (coordinate[at] + 1) * length]
    return held
