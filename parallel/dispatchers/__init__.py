"""Token dispatchers: one class per transport, all with the interface of `base.Dispatcher`."""

from .base import Dispatcher
from .local import LocalDispatcher

__all__ = ["Dispatcher", "LocalDispatcher"]
