"""The fast CPU path: plain torch operations, forward and backward, that keep their temporaries in cache."""

from .passes import moe_mlp_cpu

__all__ = ["moe_mlp_cpu"]
