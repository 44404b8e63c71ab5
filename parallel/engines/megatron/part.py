"""What this engine asks of a model: a pipeline stage that Megatron can run, which knows its tensors under our names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...checkpoint.lazy import LazyTensor

Of = Callable[[Tensor], Tensor]


class Cut(Protocol):
    """One dimension of a tensor is spread over a group, rank r of it having the r-th of equal parts."""

    @property
    def dim(self) -> int: ...

    @property
    def group(self) -> dist.ProcessGroup: ...


class LocalPart(Protocol):
    """What this rank holds of one of our tensors: its values, the shape of the whole, and how that is cut."""

    @property
    def values(self) -> Tensor: ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def cuts(self) -> Sequence[Cut]: ...


class MegatronPart(Protocol):
    """One stage of a model on this rank, an nn.Module over a MegatronModule that is its only child, `module`.

    Called as `part(**micro_batch)` it returns the summed loss of the last stage, or what the next stage receives. Its
    parameters are marked as Megatron's DDP and finalize_model_grads want it: `allreduce=False` for experts,
    `tensor_model_parallel` for what is cut over tp, `sequence_parallel` for what is whole and sees parts of sequences.
    """

    module: Any

    def __call__(self, **micro_batch: Any) -> Tensor: ...

    def begin_step(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """What all micro-batches of the pass that comes have in common."""
        ...

    def named_parameters(self) -> Any: ...

    def parameters(self) -> Any: ...

    def local_parts(self, of: Of) -> Mapping[str, LocalPart]:
        """This rank's part of each parameter, by our names, in the order of the forward pass.

        Args:
            of: what to take in the place of a parameter, of its shape.
        """
        ...

    def load_ours(self, tensors: Mapping[str, Tensor | LazyTensor], of: Of) -> None:
        """Copy this rank's part of whole tensors, all of this stage's, into what `of` gives for a parameter."""
        ...

    def live_buffers(self) -> Mapping[str, Tensor]:
        """What is saved besides parameters, by our names; the same on all ranks of the stage."""
        ...

    def initial_values(self, seed: int) -> Mapping[str, LazyTensor]:
        """What `load_ours` reads to give parameters the values of `model.reset_parameters(seed)` of our own model."""
        ...


def as_module(part: MegatronPart) -> nn.Module:
    assert isinstance(part, nn.Module)
    return part
