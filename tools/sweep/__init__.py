"""Sweeps: `scatterfold train -m` runs the trials, `scatterfold sweep` reports on them."""

from .command import main

__all__ = ["main"]
