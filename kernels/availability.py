"""Where the Triton kernels can run, and where they run without being asked for."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the Triton kernels multiply

# Whether tests/gpu has passed on a device. Until it has, the fused kernels run where they are asked for by name only.
TRITON_IS_PROVEN = False

VARIABLE = "SCATTERFOLD_BACKEND"  # forces a backend wherever none is named in the config


def interprets() -> bool:
    """Whether Triton kernels are run by its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_refuses(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device; None if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if interprets():
        return None
    if device.type != "cuda":
        return f"the Triton kernels need a GPU, this is {device.type}"
    capability = _capability(device)
    if capability < (8, 0):
        return f"the Triton kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    return None


def runs_triton(t: Tensor) -> bool:
    """Whether Triton kernels can compute with a floating-point tensor like this one."""
    return t.dtype in FLOATS and triton_refuses(t.device) is None


def builds_tables(device: torch.device) -> bool:
    """Whether routing tables are built by Triton kernels: where `choose_backend` would take them for the experts."""
    forced = os.environ.get(VARIABLE)
    if forced:
        return forced == "triton" and triton_refuses(device) is None
    return TRITON_IS_PROVEN and device.type == "cuda" and triton_refuses(device) is None


def _capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    return properties.major, properties.minor
