"""Routers: which token goes to which expert with what weight."""

from .base import Choice, Router
from .output import RouterOutput
from .threshold import ThresholdRouter
from .top_k import TopKRouter

__all__ = ["Choice", "Router", "RouterOutput", "ThresholdRouter", "TopKRouter"]
