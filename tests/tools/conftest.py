"""Commands as a user types them, in this process where that is enough."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from scatterfold.tools.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of an error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"not one line but {len(lines)}:\n{self.err}"
        return lines[0]


@pytest.fixture
def scatterfold(capfd, tmp_path, monkeypatch):
    """`scatterfold("train", …) -> Outcome`, run in this process in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def spawn():
    """`spawn(folder, "train", …) -> Outcome`, run as a process of its own."""

    def run(folder: Path, *words: object, timeout: float = 120.0, **variables: str) -> Outcome:
        import os

        command = [sys.executable, "-m", "scatterfold.tools.cli", *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def trials_here(monkeypatch):
    """Trials of a sweep run in this process, where a process of their own would cost seconds each.

    Returns: their folder names and the words that are not the same for all, in the order in which they started.
    """
    import contextlib
    import os

    from scatterfold.tools.sweep.trials import Sweep
    from scatterfold.tools.train import main as train

    started: list[tuple[str, str]] = []

    def wait(self, words, folder, environment):
        started.append((folder.name, " ".join(words[-2:])))
        with monkeypatch.context() as context, open(folder / "trial.log", "a") as log:
            for name, value in {**environment, "SCATTERFOLD_RUN_DIR": str(folder.absolute())}.items():
                context.setitem(os.environ, name, value)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                return train([*self.session.request.flags, *words])

    monkeypatch.setattr(Sweep, "_wait", wait)
    return started


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny) -> Path:
    """A run folder with checkpoints; do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *tiny, f"run_dir={folder}", "logger.display=none"]) == 0
    return folder
