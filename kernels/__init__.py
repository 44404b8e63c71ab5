"""Functions on tensors: routing tables, expert MLPs, activations, attention. No process group, no nn.Module."""

from .activations import ACTIVATIONS, activate, is_gated
from .backends import BACKENDS, choose_backend
from .errors import CheckpointError, ConfigError, DataError, InputError
from .grouped_mm import grouped_mm
from .moe_mlp import moe_mlp
from .routing import Routing
from .scatter2scatter import scatter2scatter

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "InputError",
    "Routing",
    "activate",
    "choose_backend",
    "grouped_mm",
    "is_gated",
    "moe_mlp",
    "scatter2scatter",
]
