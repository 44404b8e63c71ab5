"""Engines: one small interface to train a model over a layout, and its implementations."""

from .base import Engine, EngineChoice, Job
from .deepspeed import DeepSpeedEngine
from .torch import TorchEngine

__all__ = ["DeepSpeedEngine", "Engine", "EngineChoice", "Job", "TorchEngine"]
