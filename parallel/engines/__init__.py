"""Engines: one small interface to train a model over a layout, and its implementations."""

from .base import Engine
from .torch import TorchEngine

__all__ = ["Engine", "TorchEngine"]
