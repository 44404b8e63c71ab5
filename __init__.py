"""Scatterfold: Mixture-of-Experts training with scatter kernels and folded parallelism."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .kernels import ConfigError, InputError, Routing, moe_mlp
    from .moe import Experts, ModelConfig, MoELayer, ThresholdRouter, TopKRouter, Transformer

# Loaded at first use, so that `import scatterfold` and `scatterfold --help` do not wait for torch.
_PUBLIC = {
    "ConfigError": ".kernels",
    "Experts": ".moe",
    "InputError": ".kernels",
    "ModelConfig": ".moe",
    "MoELayer": ".moe",
    "Routing": ".kernels",
    "ThresholdRouter": ".moe",
    "TopKRouter": ".moe",
    "Transformer": ".moe",
    "moe_mlp": ".kernels",
}

__all__ = [
    "ConfigError",
    "Experts",
    "InputError",
    "ModelConfig",
    "MoELayer",
    "Routing",
    "ThresholdRouter",
    "TopKRouter",
    "Transformer",
    "__version__",
    "moe_mlp",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
