"""Where the Triton kernels can run."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the Triton kernels multiply


def runs_triton(t: Tensor) -> bool:
    """Whether Triton kernels run where this tensor is: on a GPU, and anywhere in Triton's interpreter."""
    return HAS_TRITON and (t.is_cuda or interprets())


def interprets() -> bool:
    """Whether Triton kernels are run by its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
