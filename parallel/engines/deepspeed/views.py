"""ZeRO stage 3: what autograd keeps of a gathered parameter is where it lies, not its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _View:
    """A view of a parameter, wherever that is gathered to."""

    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        whole = self.parameter.data
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


class GatheredViews:
    """Lets ZeRO free a block's parameters after its forward pass although autograd has views of them.

    ZeRO frees a gathered parameter by giving it an empty tensor. A view, such as the experts' weights in the shape that
    their kernel takes, would keep the memory until the backward pass, of every block at once. When the backward pass
    asks for it, the block is gathered again, perhaps elsewhere, and the view is made anew.

    Args:
        units: the blocks; ZeRO must have put its hooks on them before.
    """

    def __init__(self, units: Sequence[nn.Module]) -> None:
        self._gathered: dict[int, list[tuple[int, int, nn.Parameter]]] = {}
        for unit in units:
            unit.register_forward_pre_hook(self._enter)
            unit.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._gathered.clear()
        for parameter in module.parameters():
            start = parameter.data.storage_offset()
            place = self._gathered.setdefault(parameter.data.untyped_storage().data_ptr(), [])
            place.append((int(start), int(start) + parameter.data.numel(), parameter))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._gathered.clear()

    @contextlib.contextmanager
    def forgotten(self) -> Iterator[None]:
        """Around a forward pass."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        if not self._gathered or tensor.numel() == 0 or tensor.layout != torch.strided:
            return tensor
        for start, end, parameter in self._gathered.get(tensor.untyped_storage().data_ptr(), ()):
            if start <= tensor.storage_offset() < end and tensor.dtype == parameter.dtype:
                return _View(parameter, tensor.size(), tensor.stride(), int(tensor.storage_offset()) - start)
        return tensor

    @staticmethod
    def _unpack(kept: Tensor | _View) -> Tensor:
        return kept.tensor() if isinstance(kept, _View) else kept
