"""`scatterfold plan`: memory, messages, time and cost of every layout, before anything is run."""

from .command import main

__all__ = ["main"]
