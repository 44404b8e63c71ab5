"""Parts of a transformer: norm, rotary positions, attention, dense MLP, and the block that joins them."""

from .attention import Attention, KeyValueCache
from .block import Block
from .mlp import MLP, GatedMLP
from .norm import RMSNorm
from .rope import LinearScaling, Llama3Scaling, RopeScaling, RotaryTable, YarnScaling

__all__ = [
    "Attention",
    "Block",
    "GatedMLP",
    "KeyValueCache",
    "LinearScaling",
    "Llama3Scaling",
    "MLP",
    "RMSNorm",
    "RopeScaling",
    "RotaryTable",
    "YarnScaling",
]
