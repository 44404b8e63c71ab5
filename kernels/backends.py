"""The table of `moe_mlp` backends, and which of them serves a device, a dtype and a shape."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import availability, quack_backend
from .availability import FLOATS, VARIABLE, triton_refuses
from .cpu import moe_mlp_cpu
from .errors import ConfigError
from .native import moe_mlp_native, native_is_faster, native_refuses
from .reference import moe_mlp_reference
from .torch_backend import fits_grouped_mm, moe_mlp_torch


def _moe_mlp_triton(*args, **options) -> Tensor:
    from .triton_backend import moe_mlp_triton  # imports triton

    return moe_mlp_triton(*args, **options)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "triton": _moe_mlp_triton,
    "quack": quack_backend.moe_mlp_quack,
    "torch": moe_mlp_torch,
    "native": moe_mlp_native,
    "cpu": moe_mlp_cpu,
    "reference": moe_mlp_reference,
}


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it, as `scatterfold doctor` prints it."""

    backend: str
    why: str


def choose_backend(device: torch.device, dtype: torch.dtype, width: int, expert_width: int) -> Choice:
    """The fastest backend that serves experts of this kind; SCATTERFOLD_BACKEND overrides.

    Raises: ConfigError if the variable names no backend.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in BACKENDS:
            raise ConfigError(f"{VARIABLE}={forced!r} is unknown, allowed: {', '.join(BACKENDS)}")
        return Choice(forced, f"forced by {VARIABLE}")
    if device.type == "cpu" and native_is_faster(dtype, expert_width):
        refused = native_refuses(device, dtype)
        if refused is None:
            return Choice("native", "C++ kernels, compiled for this processor")
        return Choice("cpu", f"one GEMM per expert, because {refused}")
    if device.type != "cuda":
        return Choice("cpu", f"one GEMM per expert is the fastest on {device.type}")
    quack_serves = quack_backend.quack_refuses(device, dtype, width, expert_width) is None
    if quack_serves and quack_backend.QUACK_IS_FASTER:
        return Choice("quack", "fused kernels of quack-kernels")
    note = "; quack-kernels is installed but not measured (experts.backend=quack tries it)" if quack_serves else ""
    refused = _triton_refuses(device, dtype)
    if refused is None and not availability.TRITON_IS_PROVEN:
        refused = "the fused kernels have not been tested on a GPU yet (experts.backend=triton tries them)"
    if refused is None:
        return Choice("triton", f"fused kernels{note}")
    if fits_grouped_mm(dtype, width, expert_width):
        return Choice("torch", f"F.grouped_mm, because {refused}{note}")
    return Choice("cpu", f"one GEMM per expert, because {refused} and F.grouped_mm does not take this dtype and width")


def check_serves(backend: str, x: Tensor) -> None:
    """Raise ConfigError if this backend cannot run on a tensor like x."""
    if backend == "triton" and (refused := _triton_refuses(x.device, x.dtype)):
        raise ConfigError(f"experts.backend='triton' cannot run: {refused}")
    if backend == "native" and (refused := native_refuses(x.device, x.dtype)):
        raise ConfigError(f"experts.backend='native' cannot run: {refused}")
    if backend == "quack" and (refused := quack_backend.quack_refuses(x.device, x.dtype, x.shape[1])):
        raise ConfigError(f"experts.backend='quack' cannot run: {refused}")


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in FLOATS:
        return f"the Triton kernels have no {str(dtype).removeprefix('torch.')}"
    return triton_refuses(device)
