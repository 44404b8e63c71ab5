"""The GPU backend: gather, GEMM, activation and combine in fused Triton kernels. Importing it imports triton."""

from .ops import moe_mlp_triton

__all__ = ["moe_mlp_triton"]
