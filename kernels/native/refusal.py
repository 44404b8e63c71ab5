"""Where the C++ kernels serve, and where they are faster than torch's."""

from __future__ import annotations

import torch

from .build import BuildError, library, processor_flags

# Torch's GEMMs use these; ours compute in float32.
_MULTIPLIES_BFLOAT16 = {"avx512_bf16", "amx_bf16"}
# Of an expert, in float32: beyond, a GEMM of torch's for each expert is as fast or faster (docs/performance.md).
_WIDEST = 1024


@torch.compiler.assume_constant_result
def native_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot run; None if they can. Compiles them on the first call."""
    if device.type != "cpu":
        return f"the C++ kernels need a CPU, this is {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernels have no {str(dtype).removeprefix('torch.')}"
    found = library()
    return str(found) if isinstance(found, BuildError) else None


@torch.compiler.assume_constant_result
def native_is_faster(dtype: torch.dtype, expert_width: int) -> bool:
    """Whether they are, where they run."""
    if dtype == torch.bfloat16:
        return not _MULTIPLIES_BFLOAT16 & processor_flags()
    return dtype == torch.float32 and expert_width <= _WIDEST
