import random

import numpy as np
import pytest
import torch

from scatterfold.moe.training.seeds import derive_seed, deterministic_algorithms, seed_everything


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_draws_depend_on_the_parts_and_on_nothing_before():
    seed_everything(3, "step", 7, 0)
    first = draw()
    draw()
    seed_everything(3, "step", 7, 0)
    assert draw() == first
    seeds = {
        derive_seed(*parts) for parts in [(3, "step", 7, 0), (3, "step", 7, 1), (3, "step", 8, 0), (4, "step", 7, 0)]
    }
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_deterministic_mode_refuses_and_is_taken_back():
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError), deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
