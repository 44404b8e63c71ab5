"""The order of the suite, and the interpreter with which its tests start processes.

Files that start processes come first, because they wait as well as compute. Files are shared out over the test
processes in this order, so none of the long ones is left for the end, where the other test processes would have nothing
to do.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Commands run in the test process, and what they print is read: not what torch's C++ says of sockets and memory there.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

TESTS = Path(__file__).parent
FIRST = ("distributed/test_launch.py", "distributed", "tools/test_sweep.py", "test_train.py", "kernels/triton", "tools")

TINY = [
    "model=tiny",
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.kv_heads=1",
    "model.head_width=null",
    "model.ffn_width=16",
    "model.expert_width=16",
    "model.num_experts=4",
    "data.sequence_length=32",
    "data.global_batch_size=4",
    "trainer.steps=4",
    "trainer.eval_every=0",
    "trainer.checkpoint_every=2",
    "trainer.report=false",
    "trainer.device=cpu",
    "schedule.warmup_steps=1",
]


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.relative_to(TESTS).as_posix()
        return next((at for at, start in enumerate(FIRST) if path.startswith(start)), len(FIRST))

    items.sort(key=place)  # stable: the order within a file stays


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory):
    """Path of an interpreter whose imports are done: see nursery/server.py. One for all test processes of a run."""
    in_one_of_many = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if in_one_of_many else base) / "nursery"
    python, sockets = folder / "python", folder / "socket"
    try:
        folder.mkdir()
    except FileExistsError:
        pass  # another test process starts it
    else:
        python.write_text(f"#!{sys.executable} -IS\n{(TESTS / 'nursery' / 'python.py').read_text()}")
        python.chmod(0o755)
        owner = os.getppid() if in_one_of_many else os.getpid()
        subprocess.Popen(
            [sys.executable, TESTS / "nursery" / "server.py", sockets, python, str(owner)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "errors").open("w"),
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    while not sockets.exists():
        assert time.monotonic() < deadline, f"the nursery could not start: {(folder / 'errors').read_text()}"
        time.sleep(0.01)
    return str(python)


@pytest.fixture(scope="module")
def warm(warm_python):
    """`sys.executable` is `warm_python`, for whatever this process starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of text; what training prepares from it is cached beside it."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        words = " ".join(f"word{(number * 7 + i * i) % 13}" for i in range(120))
        (folder / f"{number:02d}.txt").write_text(words)
    return folder


@pytest.fixture(scope="session")
def tiny(corpus) -> list[str]:
    """Overrides of a run that takes a second."""
    return [*TINY, f"data.path={corpus}", f"data.cache_dir={corpus.parent / 'cache'}"]
