"""What a training step needs before it is run: memory, messages and time of every layout, from formulas."""

from .communication import KINDS, Message, messages, volume
from .devices import DEVICES, Device
from .inventory import Inventory
from .job import Job, Workload
from .memory import PARTS, Memory, peak_memory
from .search import SIZES, Candidate, evaluate, legal_layouts, search
from .step_time import StepTime, step_time

__all__ = [
    "DEVICES",
    "KINDS",
    "PARTS",
    "SIZES",
    "Candidate",
    "Device",
    "Inventory",
    "Job",
    "Memory",
    "Message",
    "StepTime",
    "Workload",
    "evaluate",
    "legal_layouts",
    "messages",
    "peak_memory",
    "search",
    "step_time",
    "volume",
]
