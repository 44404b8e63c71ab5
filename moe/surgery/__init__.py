"""Experts of a trained mixture removed, merged and added: stored model to stored model."""

from .grow import Noise
from .operations import Grow, Made, Merge, Operation, Prune
from .receipt import Measured, Sizes, SurgeryReceipt
from .run import Job, operate
from .usage import Usage, measure_usage

__all__ = [
    "Grow",
    "Job",
    "Made",
    "Measured",
    "Merge",
    "Noise",
    "Operation",
    "Prune",
    "Sizes",
    "SurgeryReceipt",
    "Usage",
    "measure_usage",
    "operate",
]
