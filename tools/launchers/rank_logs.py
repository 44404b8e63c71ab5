"""Where ranks print: RUN/logs/rank-N.out and rank-N.err, and the first rank on the terminal too."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs


class RankLogs(LogsSpecs):
    """A pair of files a rank; a rank that starts again in the same folder gets rank-N.2.out, rank-N.2.err and so on.

    On a terminal, rank 0's stdout stays on it, so that it can draw its live display; elsewhere it goes to its file and
    from there to our stdout. Its stderr goes to the file only: what the user must know, the launcher says in one line.

    Attributes:
        errors: the stderr file of each rank of this machine.

    Args:
        before_start: called each time before the ranks of this machine start.

    Raises: OSError if the folder cannot be made.
    """

    def __init__(self, folder: Path, before_start: Callable[[], None] = lambda: None) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self.errors: dict[int, Path] = {}
        self.before_start = before_start
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The files of each local rank, by torch's numbering."""
        self.before_start()
        self.errors.clear()  # after a machine has left, ranks have other numbers
        out: dict[int, str] = {}
        err: dict[int, str] = {}
        tee: dict[int, str] = {}
        for local, env in envs.items():
            rank = int(env["RANK"])
            stem = self._free_stem(rank)
            out[local], err[local] = str(self.folder / f"{stem}.out"), str(self.folder / f"{stem}.err")
            self.errors[rank] = Path(err[local])
            if rank == 0 and sys.stdout.isatty():
                out[local] = ""  # torch's word for our own stdout
            elif rank == 0:
                tee[local] = out[local]
            env["TORCHELASTIC_ERROR_FILE"] = ""  # ranks leave word in the launcher's folder instead
        nowhere = {local: str(self.folder / f"rank-{env['RANK']}.json") for local, env in envs.items()}
        return LogsDest(out, err, tee, {}, nowhere, "", "")

    def _free_stem(self, rank: int) -> str:
        stem, number = f"rank-{rank}", 1
        while (self.folder / f"{stem}.err").exists():
            number += 1
            stem = f"rank-{rank}.{number}"
        return stem


def nccl_timeout(log: Path) -> str | None:
    """The collective that NCCL's watchdog gave up on, in its words, if that is why a rank of this log ended."""
    try:
        text = log.read_text(errors="replace") if log.is_file() else ""
    except OSError:
        return None
    found = re.search(r"caught collective operation timeout: (WorkNCCL.*? milliseconds)", text)
    return found.group(1) if found else None
