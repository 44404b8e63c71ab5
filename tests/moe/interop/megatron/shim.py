"""Lets Megatron-Core build, run, save and load a GPTModel on a CPU, in this process.

It asks for CUDA in a handful of places that compute nothing, writes checkpoints from processes of its own, and its MoE
layer names a function of Transformer Engine. What is compared is its own code all the same: the model classes, their
sharded state dict, and dist_checkpointing.
"""

from __future__ import annotations

import contextlib
import queue
from types import SimpleNamespace

import torch


class _InlineProcess:
    def __init__(self, target, kwargs) -> None:
        self._run = lambda: target(**kwargs)

    def start(self) -> None:
        self._run()

    def join(self) -> None:
        pass


class _Stream:
    def __init__(self, *_args, **_options) -> None:
        pass

    def wait_stream(self, other) -> None:
        pass


_CONTEXT = SimpleNamespace(Queue=queue.Queue, JoinableQueue=queue.Queue, Process=_InlineProcess)
_CONTEXT.Manager = lambda: _CONTEXT


def apply(patch) -> None:
    """Patch Megatron-Core and torch.cuda through a pytest `MonkeyPatch`."""
    cpu = torch.device("cpu")
    for name, value in {
        "current_device": lambda: cpu,
        "synchronize": lambda *_: None,
        "current_stream": lambda *_: None,
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": _Stream,
    }.items():
        patch.setattr(torch.cuda, name, value)
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import moe_utils

    patch.setattr(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    patch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    patch.setattr(filesystem_async, "mp", SimpleNamespace(get_context=lambda _: _CONTEXT, **_types()))
    patch.setattr(filesystem_async, "_process_memory", lambda: 0)  # would ask for psutil


def _types() -> dict:
    return {"Queue": queue.Queue, "SimpleQueue": queue.Queue, "JoinableQueue": queue.Queue}
