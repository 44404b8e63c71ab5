"""The GPU backend: gather, GEMM, activation and combine in fused Triton kernels. Import only where triton is installed."""

from .ops import moe_mlp_triton

__all__ = ["moe_mlp_triton"]
