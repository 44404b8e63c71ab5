"""The model and its learning: routers, experts, layers, models, data, training."""

from .adapters import AdapterExperts
from .experts import Experts
from .generate import generate
from .layer import MoELayer
from .models import ModelConfig, Transformer
from .routers import ThresholdRouter, TopKRouter

__all__ = [
    "AdapterExperts",
    "Experts",
    "ModelConfig",
    "MoELayer",
    "ThresholdRouter",
    "TopKRouter",
    "Transformer",
    "generate",
]
