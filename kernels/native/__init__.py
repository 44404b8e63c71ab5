"""C++ kernels for CPU, compiled on first use for the processor that runs them."""

from .passes import moe_mlp_native
from .refusal import native_is_faster, native_refuses

__all__ = ["moe_mlp_native", "native_is_faster", "native_refuses"]
