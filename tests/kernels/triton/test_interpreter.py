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
SHARED = (
    "test_grouped_mm.py",
    "test_scatter2scatter.py",
    "test_moe_mlp_memory.py",
)  # where triton interprets, these run the kernels
PROCESSES = {
    "moe_mlp": [HERE / "cases_moe_mlp.py"],
    "others": [HERE / "cases_configs.py", HERE / "cases_routing.py", *(HERE.parent / name for name in SHARED)],
}


@pytest.mark.parametrize("cases", PROCESSES.values(), ids=PROCESSES)
def test_interpreted(cases):
    command = [sys.executable, "-m", "pytest", *map(str, cases), "-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
