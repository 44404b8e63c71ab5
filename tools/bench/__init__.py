"""`scatterfold bench`: measured speed and memory."""

from .command import main

__all__ = ["main"]
