"""Token dispatchers: one class per transport, all with the interface of `base.Dispatcher`."""

from .all_gather import AllGatherDispatcher
from .all_to_all import AllToAllDispatcher
from .base import Arrival, Dispatched, Dispatcher, Pending, run_experts
from .local import LocalDispatcher

__all__ = [
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "Arrival",
    "Dispatched",
    "Dispatcher",
    "LocalDispatcher",
    "Pending",
    "run_experts",
]
