"""The order of the suite, and the interpreter with which its tests start processes.

Files that start processes come first, because they wait as well as compute. Files are shared out over the test
processes in this order, so none of the long ones is left for the end, where the other test processes would have nothing
to do.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FIRST = ("distributed/test_launch.py", "distributed", "tools/test_sweep.py", "test_train.py", "kernels/triton", "tools")


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.relative_to(TESTS).as_posix()
        return next((at for at, start in enumerate(FIRST) if path.startswith(start)), len(FIRST))

    items.sort(key=place)  # stable: the order within a file stays


@pytest.fixture(scope="session")
def warm_python():
    """Path of an interpreter whose imports are done: see nursery/server.py. One for all modules of a test process."""
    folder = Path(tempfile.mkdtemp(prefix="nursery_"))  # short: a socket's path has 100 characters at most
    python, sockets = folder / "python", folder / "socket"
    python.write_text(f"#!{sys.executable} -IS\n{(TESTS / 'nursery' / 'python.py').read_text()}")
    python.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, TESTS / "nursery" / "server.py", sockets, python],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
    )
    while not sockets.exists():
        assert server.poll() is None, "the nursery could not start"
        time.sleep(0.01)
    yield str(python)
    server.stdin.close()
    server.wait(timeout=30)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def warm(warm_python):
    """`sys.executable` is `warm_python`, for whatever this process starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python)
        yield
