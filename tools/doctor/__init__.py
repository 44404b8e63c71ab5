"""`scatterfold doctor`: what this machine can do, and whether it computes correctly."""

from .command import main

__all__ = ["main"]
