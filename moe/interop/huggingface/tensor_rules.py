"""How tensors of ours and of theirs belong together, both ways at once.

A `TensorRule` joins some of our tensors to the keys that hold the same values in a Hugging Face folder. It may know
several layouts of theirs: the first one that a folder has is read, one is written. Everything is lazy and exact: a
rule moves, cuts and joins values, it never computes with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....kernels import CheckpointError
from ....parallel.checkpoint.lazy import Index, LazyTensor, constant, narrow, select, stack, transpose

Tensors = Sequence[LazyTensor]


@dataclass(frozen=True)
class Layout:
    """One way in which they lay tensors out.

    Attributes:
        keys: theirs.
        read: from their tensors, in the order of `keys`, to ours, in the order of the rule's names.
        write: the other way; given tensors of our shapes it must not read them, so that it also tells their shapes.
        fused: experts stacked in 3-D keys, as transformers holds them in memory.
    """

    keys: tuple[str, ...]
    read: Callable[[Tensors], Tensors]
    write: Callable[[Tensors], Tensors]
    fused: bool = False


@dataclass(frozen=True)
class TensorRule:
    """Some of our tensors, and the layouts in which they may have them.

    Attributes:
        names: ours; none for keys of theirs that say nothing to us.
        layouts: read if the folder has their first key; the first is written, or the first fused one where asked for.
    """

    names: tuple[str, ...]
    layouts: tuple[Layout, ...]

    def layout(self, fused: bool) -> Layout:
        """The one to write."""
        return next((layout for layout in self.layouts if layout.fused == fused), self.layouts[0])


def same(name: str, *keys: str, fused: str | None = None) -> TensorRule:
    """The same tensor by any of `keys`; the first is written, or `fused` where experts are fused."""
    layouts = [Layout((key,), list, list) for key in keys]
    if fused is not None and fused not in keys:
        layouts.append(Layout((fused,), list, list, fused=True))
    return TensorRule((name,), tuple(layouts))


def linear(name: str, key: str, bias: bool = False) -> list[TensorRule]:
    """The weight of a projection, and its bias where it has one; `key` without .weight."""
    return [same(f"{name}.{part}", f"{key}.{part}") for part in (("weight", "bias") if bias else ("weight",))]


def filled(name: str, shape: Sequence[int], value: float = 0.0, dtype: torch.dtype = torch.float32) -> TensorRule:
    """A tensor of ours that they do not have: read as a constant, not written."""
    return TensorRule((name,), (Layout((), lambda _: [constant(value, shape, dtype)], lambda _: []),))


def added(key: str, shape: Sequence[int], value: float = 0.0, check: str | None = None) -> TensorRule:
    """A tensor of theirs that we do not have: written as a constant, in the dtype of the model, and left unread.

    Args:
        check: read it after all, and raise CheckpointError with this text, behind the key, where it holds other values.
    """

    def read(theirs: Tensors) -> Tensors:
        if check is not None and not torch.all(theirs[0].read() == value):
            raise CheckpointError(f"{key} {check}")
        return []

    return TensorRule((), (Layout((key,), read, lambda _: [constant(value, shape)]),))


def mapped(
    rule: TensorRule, read: Callable[[LazyTensor], LazyTensor], write: Callable[[LazyTensor], LazyTensor]
) -> TensorRule:
    """A rule whose tensors of theirs go through `read` first, and through `write` at the end: a transpose, a reorder of
    rows."""

    def changed(layout: Layout) -> Layout:
        return replace(
            layout,
            read=lambda theirs: layout.read([read(tensor) for tensor in theirs]),
            write=lambda ours: [write(tensor) for tensor in layout.write(ours)],
        )

    return TensorRule(rule.names, tuple(changed(layout) for layout in rule.layouts))


def gated_experts(
    name: str, prefixes: Sequence[str], num_experts: int, gate: str = "gate_proj", up: str = "up_proj"
) -> TensorRule:
    """Our w_in (E, 2, F, D) of gated experts, gate first.

    Theirs: `<prefix>.<e>.<gate>.weight` and `<prefix>.<e>.<up>.weight` (F, D) each, or `<prefix>.gate_up_proj`
    (E, 2F, D), gate rows first. Of several prefixes the first is written per expert, the last fused.
    """

    def read(theirs: Tensors) -> Tensors:
        theirs = same_dtype(theirs)
        return [stack([stack(theirs[2 * expert : 2 * expert + 2]) for expert in range(num_experts)])]

    def write(ours: Tensors) -> Tensors:
        return [select(select(ours[0], expert), half) for expert in range(num_experts) for half in (0, 1)]

    layouts = [
        Layout(
            tuple(f"{prefix}.{expert}.{half}.weight" for expert in range(num_experts) for half in (gate, up)),
            read,
            write,
        )
        for prefix in prefixes
    ]
    fused = [
        Layout(
            (f"{prefix}.gate_up_proj",),
            lambda theirs: [split_rows(theirs[0], 1, 2)],
            lambda ours: [join_rows(ours[0], 1)],
            fused=True,
        )
        for prefix in reversed(prefixes)
    ]
    return TensorRule((name,), (*layouts, *fused))


def stacked_experts(
    name: str, prefixes: Sequence[str], num_experts: int, part: str = "down_proj", fused_part: str = "down_proj"
) -> TensorRule:
    """Our w_out (E, D, F): `<prefix>.<e>.<part>.weight` (D, F) each, or `<prefix>.<fused_part>` (E, D, F)."""
    layouts = [
        Layout(
            tuple(f"{prefix}.{expert}.{part}.weight" for expert in range(num_experts)),
            lambda theirs: [stack(same_dtype(theirs))],
            lambda ours: [select(ours[0], expert) for expert in range(num_experts)],
        )
        for prefix in prefixes
    ]
    fused = [Layout((f"{prefix}.{fused_part}",), list, list, fused=True) for prefix in reversed(prefixes)]
    return TensorRule((name,), (*layouts, *fused))


def same_dtype(tensors: Tensors) -> Tensors:
    """The tensors in the narrowest dtype that holds all of them."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(dtype) for tensor in tensors]


def split_rows(tensor: LazyTensor, dim: int, parts: int) -> LazyTensor:
    """A dimension of parts * n in two, (parts, n); reads only what is asked for."""
    length = tensor.shape[dim] // parts
    shape = torch.Size([*tensor.shape[:dim], parts, length, *tensor.shape[dim + 1 :]])

    def fetch(index: Index) -> Tensor:
        outer, inner = index[dim], index[dim + 1]

        def rows(start: int, stop: int) -> Tensor:
            return tensor.read([*index[:dim], slice(start, stop), *index[dim + 2 :]])

        if inner.start == 0 and inner.stop == length:
            return rows(outer.start * length, outer.stop * length).unflatten(dim, (outer.stop - outer.start, length))
        pieces = [rows(part * length + inner.start, part * length + inner.stop) for part in range(parts)[outer]]
        if not pieces:
            return torch.empty([cut.stop - cut.start for cut in index], dtype=tensor.dtype)
        return torch.stack(pieces, dim)

    return LazyTensor(shape, tensor.dtype, fetch)


def join_rows(tensor: LazyTensor, dim: int) -> LazyTensor:
    """Dimensions dim and dim + 1 as one; reads the entries of dim that are touched, whole."""
    parts, length = tensor.shape[dim : dim + 2]
    shape = torch.Size([*tensor.shape[:dim], parts * length, *tensor.shape[dim + 2 :]])

    def fetch(index: Index) -> Tensor:
        start, stop = index[dim].start, index[dim].stop
        if start == stop or not length:
            return torch.empty([cut.stop - cut.start for cut in index], dtype=tensor.dtype)
        first, last = start // length, -(-stop // length)
        whole = tensor.read([*index[:dim], slice(first, last), slice(0, length), *index[dim + 1 :]])
        return whole.flatten(dim, dim + 1).narrow(dim, start - first * length, stop - start)

    return LazyTensor(shape, tensor.dtype, fetch)


def interleaved_halves(tensor: LazyTensor, dim: int) -> LazyTensor:
    """Rows g0 u0 g1 u1 ... of a dimension as (2, n), all g before all u; `joined_interleaved` is its inverse."""
    return transpose(split_rows(tensor, dim, tensor.shape[dim] // 2), dim, dim + 1)


def joined_interleaved(tensor: LazyTensor, dim: int) -> LazyTensor:
    """(2, n) as rows g0 u0 g1 u1 ... of one dimension."""
    return join_rows(transpose(tensor, dim, dim + 1), dim)


def half(tensor: LazyTensor, dim: int, which: int) -> LazyTensor:
    """The first (0) or second (1) half of a dimension."""
    length = tensor.shape[dim] // 2
    return narrow(tensor, dim, which * length, length)
