"""Random numbers that depend on what they are for and on nothing else.

Each matrix has its own generator, seeded by (seed, layer, expert, matrix), and is drawn whole. So a conversion gives
the same bits on one process and on many, in any order, and a part of a matrix is the same as that part of the whole.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU for this key."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(shape: tuple[int, ...], std: float, *key: int | str) -> Tensor:
    """Float32 from N(0, std^2)."""
    return torch.empty(shape).normal_(0.0, std, generator=generator(*key))


def permutation(size: int, *key: int | str) -> Tensor:
    """The numbers below `size` in a random order."""
    return torch.randperm(size, generator=generator(*key))
