"""The order of the suite: files that start processes come first, because they wait as well as compute.

Files are shared out over the test processes in this order, so none of the long ones is left for the end, where the
other test processes would have nothing to do.
"""

from pathlib import Path

TESTS = Path(__file__).parent
FIRST = ("distributed/test_launch.py", "distributed", "tools/test_sweep.py", "test_train.py", "kernels/triton", "tools")


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.relative_to(TESTS).as_posix()
        return next((at for at, start in enumerate(FIRST) if path.startswith(start)), len(FIRST))

    items.sort(key=place)  # stable: the order within a file stays
