"""Training: optimizers, schedules and the run that puts everything together."""

from .optimizers import AdamW
from .schedules import WSD, Constant, Cosine, Linear, Schedule
from .settings import LoggerSettings, TrainerSettings

__all__ = ["WSD", "AdamW", "Constant", "Cosine", "Linear", "LoggerSettings", "Schedule", "TrainerSettings"]
