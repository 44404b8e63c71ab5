"""Processes, layouts, token dispatchers, engines and checkpoints. Knows no model: a model hands it its parts.

Engines and checkpoints are imported from their own packages, for they load much of torch.distributed.
"""

from .layout import Layout
from .process import Process

__all__ = ["Layout", "Process"]
