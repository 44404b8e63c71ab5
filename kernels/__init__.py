"""Functions on tensors: routing tables, expert MLPs, activations, attention. No process group, no nn.Module."""

from .activations import ACTIVATIONS, activate, is_gated
from .errors import CheckpointError, ConfigError, DataError, InputError
from .moe_mlp import BACKENDS, moe_mlp
from .routing import Routing

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "InputError",
    "Routing",
    "activate",
    "is_gated",
    "moe_mlp",
]
