"""Parts of a transformer: norm, rotary positions, attention, dense MLP, and the block that joins them."""

from .attention import Attention, KeyValueCache, SelfAttention
from .block import Block
from .latent_attention import LatentAttention, MultiHeadLatentAttention
from .mlp import MLP, GatedMLP
from .norm import RMSNorm
from .rope import LinearScaling, Llama3Scaling, RopeScaling, RotaryTable, YarnScaling

__all__ = [
    "Attention",
    "Block",
    "GatedMLP",
    "KeyValueCache",
    "LatentAttention",
    "LinearScaling",
    "Llama3Scaling",
    "MLP",
    "MultiHeadLatentAttention",
    "RMSNorm",
    "RopeScaling",
    "RotaryTable",
    "SelfAttention",
    "YarnScaling",
]
