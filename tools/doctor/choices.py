"""Which backend computes the experts, by device, dtype and shape, and why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels import choose_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Model width and expert width: a small model, fine experts, Qwen3-30B-A3B, Mixtral 8x7B, and one that is not aligned.
SHAPES = ((512, 1024), (512, 128), (2048, 768), (4096, 14336), (100, 50))


@dataclass(frozen=True)
class BackendChoice:
    """The answer for one device, dtype and shape."""

    device: str
    dtype: str
    width: int
    expert_width: int
    backend: str
    why: str

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def devices() -> list[torch.device]:
    """The CPU, and a GPU if there is one. GPUs of one machine are taken to be alike."""
    cuda = [torch.device("cuda", 0)] if torch.cuda.is_available() else []
    return [torch.device("cpu"), *cuda]


def backend_choices() -> list[BackendChoice]:
    """Every device, dtype and shape. Raises: ConfigError if the environment forces a backend that does not exist."""
    found = []
    for device in devices():
        for dtype_name, dtype in DTYPES.items():
            for width, expert_width in SHAPES:
                choice = choose_backend(device, dtype, width, expert_width)
                found.append(BackendChoice(device.type, dtype_name, width, expert_width, choice.backend, choice.why))
    return found
