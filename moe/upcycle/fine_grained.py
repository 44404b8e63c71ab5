"""Fine-grained upcycling (2410.07524): each dense MLP is cut along its hidden width into several experts."""

from __future__ import annotations

from .method import Method


class FineGrained(Method):
    """R copies of the dense MLP, each cut into G experts that share a router row (virtual groups).

    The experts of a copy have the same score, and top-K with K % G == 0 takes copies whole, so that the layer begins as
    the dense MLP; from the first step on each router row learns for itself. Where the constant goes that this needs:
    `scaling`.
    """
