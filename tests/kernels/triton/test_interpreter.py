"""The Triton kernels under TRITON_INTERPRET=1: their indices, masks and formulas, on a machine without a GPU.

The variable must be set before triton is imported, so each file of cases runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
CASES = [
    *sorted(HERE.glob("cases_*.py")),
    *(HERE.parent / f"test_{name}.py" for name in ("grouped_mm", "scatter2scatter")),
]


@pytest.mark.parametrize("cases", CASES, ids=[path.stem for path in CASES])
def test_interpreted(cases):
    command = [sys.executable, "-m", "pytest", str(cases), "-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
