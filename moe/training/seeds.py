"""Random numbers of a run, as a function of (seed, step, rank).

Nothing random depends on what was drawn before, so a resumed run draws what an uninterrupted one would have drawn, and
a checkpoint needs to hold the seed and the step only, for any number of processes.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values that print the same everywhere."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(*parts: object) -> None:
    """Seed Python, NumPy and torch (all devices) from the given values."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
