"""The files `cases_*.py` here are run by test_interpreter.py, in a process of their own with TRITON_INTERPRET=1."""

import pytest
import torch


@pytest.fixture
def poisoned():
    """Fill whatever torch.empty returns with NaN (integers: the largest), so that nothing unwritten passes as right."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
