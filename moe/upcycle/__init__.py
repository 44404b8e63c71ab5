"""Dense models made into mixtures of experts."""

from .convert import upcycle
from .measure import Measured, measure
from .plan import UpcyclePlan, plan_upcycle
from .settings import METHODS, UpcycleSettings
from .target import architecture_of, target_of

__all__ = [
    "METHODS",
    "Measured",
    "UpcyclePlan",
    "UpcycleSettings",
    "architecture_of",
    "measure",
    "plan_upcycle",
    "target_of",
    "upcycle",
]
