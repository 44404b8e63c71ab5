"""What a training step needs before it is run: memory, messages and time of every layout, from formulas."""

from .communication import KINDS, Message, messages, volume
from .devices import DEVICES, Device, find_device
from .inventory import Inventory
from .job import Job, Workload
from .memory import Memory, peak_memory
from .step_time import StepTime, step_time

__all__ = [
    "DEVICES",
    "KINDS",
    "Device",
    "Inventory",
    "Job",
    "Memory",
    "Message",
    "StepTime",
    "Workload",
    "find_device",
    "messages",
    "peak_memory",
    "step_time",
    "volume",
]
