"""The engine that hands a model to Megatron-Core: its DDP, distributed optimizer and pipeline schedules."""

from .engine import MegatronCoreEngine
from .part import Cut, LocalPart, MegatronPart

__all__ = ["Cut", "LocalPart", "MegatronCoreEngine", "MegatronPart"]
