"""Tensors that are read when they are needed, and only the part that is.

Every format opens as a mapping of names to `LazyTensor`s; what changes a model (another layout, another architecture,
upcycling) maps them to other lazy tensors. So a rank reads its own part of a model of any size, from any format, and
no step in between holds more than the tensor that is being read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Index = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that is known by its shape and dtype, and read in parts.

    Attributes:
        shape, dtype: of the whole.
        fetch: gets one slice a dimension, with start and stop given, and returns that part on the CPU. The caller may
            write into what it gets.
    """

    shape: torch.Size
    dtype: torch.dtype
    fetch: Callable[[Index], Tensor]

    def read(self, index: Sequence[slice | range] | None = None) -> Tensor:
        """The part at `index`, one slice or range of step 1 a dimension; None for the whole."""
        cuts = [slice(0, size) for size in self.shape] if index is None else list(index)
        part = self.fetch(tuple(_within(cut, size) for cut, size in zip(cuts, self.shape, strict=True)))
        return part.to(self.dtype)

    @property
    def bytes(self) -> int:
        """Of the whole."""
        return self.shape.numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same values in another dtype."""
        return self if dtype == self.dtype else LazyTensor(self.shape, dtype, self.fetch)


def in_memory(tensor: Tensor) -> LazyTensor:
    """A tensor that is there already."""
    return LazyTensor(tensor.shape, tensor.dtype, lambda index: tensor[index].clone())


def constant(value: float, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> LazyTensor:
    """One value everywhere."""
    return LazyTensor(
        torch.Size(shape), dtype, lambda index: torch.full([cut.stop - cut.start for cut in index], value, dtype=dtype)
    )


def computed(shape: Sequence[int], dtype: torch.dtype, whole: Callable[[], Tensor]) -> LazyTensor:
    """What can only be computed whole; any part of it costs as much."""
    return LazyTensor(torch.Size(shape), dtype, lambda index: whole()[index].clone())


def pointwise(tensor: LazyTensor, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> LazyTensor:
    """A function that treats every element alike."""
    return LazyTensor(tensor.shape, dtype or tensor.dtype, lambda index: function(tensor.read(index)))


def stack(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors of one shape under a new dimension 0; a slice of it reads only the ones it holds."""
    first = tensors[0]

    def fetch(index: Index) -> Tensor:
        held = tensors[index[0]]
        if not held:
            return torch.empty([0, *(cut.stop - cut.start for cut in index[1:])], dtype=first.dtype)
        return torch.stack([tensor.read(index[1:]) for tensor in held])

    return LazyTensor(torch.Size((len(tensors), *first.shape)), first.dtype, fetch)


def cat(tensors: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    """Tensors one after another along a dimension; a slice of it reads only what it covers."""
    first = tensors[0]
    sizes = [tensor.shape[dim] for tensor in tensors]
    shape = list(first.shape)
    shape[dim] = sum(sizes)

    def fetch(index: Index) -> Tensor:
        parts, begin = [], 0
        for tensor, size in zip(tensors, sizes):
            start, stop = max(index[dim].start - begin, 0), min(index[dim].stop - begin, size)
            if start < stop:
                parts.append(tensor.read([*index[:dim], slice(start, stop), *index[dim + 1 :]]))
            begin += size
        if not parts:
            return torch.empty([cut.stop - cut.start for cut in index], dtype=first.dtype)
        return torch.cat([part.to(first.dtype) for part in parts], dim)

    return LazyTensor(torch.Size(shape), first.dtype, fetch)


def narrow(tensor: LazyTensor, dim: int, start: int, length: int) -> LazyTensor:
    """The part from `start` on along a dimension."""
    shape = list(tensor.shape)
    shape[dim] = length

    def fetch(index: Index) -> Tensor:
        cut = slice(start + index[dim].start, start + index[dim].stop)
        return tensor.read([*index[:dim], cut, *index[dim + 1 :]])

    return LazyTensor(torch.Size(shape), tensor.dtype, fetch)


def select(tensor: LazyTensor, at: int) -> LazyTensor:
    """One entry of dimension 0, without that dimension: one expert of a stack."""
    return LazyTensor(tensor.shape[1:], tensor.dtype, lambda index: tensor.read([slice(at, at + 1), *index])[0])


def take(tensor: LazyTensor, dim: int, indices: Sequence[int]) -> LazyTensor:
    """Entries of a dimension in the order given; neighbours are read in one piece."""
    shape = list(tensor.shape)
    shape[dim] = len(indices)

    def fetch(index: Index) -> Tensor:
        wanted = list(indices[index[dim].start : index[dim].stop])
        if not wanted:
            return torch.empty([cut.stop - cut.start for cut in index], dtype=tensor.dtype)
        low = min(wanted)
        block = tensor.read([*index[:dim], slice(low, max(wanted) + 1), *index[dim + 1 :]])
        return block.index_select(dim, torch.tensor(wanted) - low)

    return LazyTensor(torch.Size(shape), tensor.dtype, fetch)


def transpose(tensor: LazyTensor, one: int, other: int) -> LazyTensor:
    """Two dimensions exchanged."""

    def swap(values: list) -> list:
        values[one], values[other] = values[other], values[one]
        return values

    return LazyTensor(
        torch.Size(swap(list(tensor.shape))),
        tensor.dtype,
        lambda index: tensor.read(swap(list(index))).transpose(one, other).contiguous(),
    )


def reshape(tensor: LazyTensor, shape: Sequence[int]) -> LazyTensor:
    """Another shape of the same elements; any part of it reads the whole."""
    target = torch.Size(shape)

    def fetch(index: Index) -> Tensor:
        return tensor.read().reshape(target)[index].clone()

    return LazyTensor(target, tensor.dtype, fetch)


def _within(cut: slice | range, size: int) -> slice:
    start = 0 if cut.start is None else cut.start
    stop = size if cut.stop is None else cut.stop
    return slice(start, max(start, min(stop, size)))
