"""Processes, layouts, token dispatchers, engines and checkpoints. Knows no model: a model hands it its parts.

Meshes, engines and checkpoints are imported from their own modules, for they load much of torch.distributed.
"""

from .layout import Layout, ResolvedLayout
from .process import Process

__all__ = ["Layout", "Process", "ResolvedLayout"]
