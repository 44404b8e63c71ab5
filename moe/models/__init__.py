"""The decoder-only transformer: its configuration, the module, its sizes."""

from .config import ModelConfig
from .counts import ModelCounts, count_model
from .transformer import Transformer

__all__ = ["ModelConfig", "ModelCounts", "Transformer", "count_model"]
