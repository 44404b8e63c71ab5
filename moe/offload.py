"""Activation offload: what the backward pass needs waits in the memory of the CPU."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 2**20  # smaller tensors stay: there are many, and moving them saves little

# Steps from a weight to what a product of matrices saves of it.
_OF_A_WEIGHT = (
    *("ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "_ToTorchTensorBackward"),
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"),
)


def offloaded() -> contextlib.AbstractContextManager[None]:
    """Within it, what a forward pass on a GPU saves for its backward pass goes to pinned memory, and returns for it.

    A tensor that several operations save is moved once. Weights stay, for they are on the device anyway. Both copies
    run in the order of the computation, and the CPU waits for neither. Around `recompute.checkpointed` calls it moves
    what they keep, their inputs. On a CPU nothing moves.
    """
    mover = _Mover()
    return saved_tensors_hooks(mover.pack, mover.unpack)  # type: ignore[return-value]


class _Offloaded:
    """A saved tensor in pinned memory."""

    def __init__(self, saved: Tensor) -> None:
        self.device = saved.device
        self.host = _to_host(saved)
        self.uses = self.left = 0
        self.back: Tensor | None = None

    def fetch(self) -> Tensor:
        """The tensor on its device, which is kept until all that saved it have had it."""
        back = self.host.to(self.device, non_blocking=True) if self.back is None else self.back
        self.left -= 1
        self.back = back
        if self.left <= 0:
            self.left, self.back = self.uses, None
        return back


class _Mover:
    """The two hooks, and what has been moved so far, by storage: one that is freed and reused is not confused."""

    def __init__(self) -> None:
        self.moved: dict[tuple, tuple[StorageWeakRef, _Offloaded]] = {}

    @torch.no_grad()
    def pack(self, saved: Tensor) -> Tensor | _Offloaded:
        if saved.numel() * saved.element_size() < MIN_BYTES or not _leaves(saved.device) or _is_weight(saved):
            return saved
        storage = StorageWeakRef(saved.untyped_storage())
        key = (storage.cdata, saved.storage_offset(), saved.shape, saved.stride(), saved.dtype, saved._version)
        if key not in self.moved or self.moved[key][0].expired():
            self.moved[key] = (storage, _Offloaded(saved.detach()))
        moved = self.moved[key][1]
        moved.uses += 1
        moved.left = moved.uses
        return moved

    def unpack(self, packed: Tensor | _Offloaded) -> Tensor:
        return packed.fetch() if isinstance(packed, _Offloaded) else packed


def _leaves(device: torch.device) -> bool:
    return device.type == "cuda"


def _to_host(saved: Tensor) -> Tensor:
    host = torch.empty_like(saved, device="cpu", pin_memory=True)
    return host.copy_(saved, non_blocking=True)


def _is_weight(saved: Tensor) -> bool:
    """Whether it is a parameter, or the same values in another dtype or shape."""
    if isinstance(saved, nn.Parameter) or isinstance(saved._base, nn.Parameter):
        return True
    node = saved.grad_fn
    if node is None:
        return False
    while node is not None and node.name() in _OF_A_WEIGHT:
        node = node.next_functions[0][0]
    return node is not None and hasattr(node, "variable")
