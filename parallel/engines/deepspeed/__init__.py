"""The engine that hands a model to DeepSpeed: ZeRO stages 0 to 3, offload, expert parallelism with stages 0 to 2."""

from .engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
