"""Sparse upcycling (2212.05055): every expert is a copy of the dense MLP, and the router is new."""

from __future__ import annotations

from .method import Method


class Sparse(Method):
    """Copies that only training makes differ: each sees the tokens that the new router sends it."""
