"""One folder per run, the same on all ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from ..kernels.errors import ConfigError
from . import rank_report

VARIABLE = "SCATTERFOLD_RUN_DIR"
PARENT = Path("runs")


@contextlib.contextmanager
def run_folder(given: str | None) -> Iterator[Path]:
    """The folder of this run, agreed upon by all ranks.

    In this order: what the configuration gives, what the launcher gives (`SCATTERFOLD_RUN_DIR`), and a new folder
    runs/DATE_TIME. A new folder is made at once, so that no other run takes its name, and removed again if nothing
    came into it.

    Raises: ConfigError if it cannot be made, or if the ranks have no means to agree.
    """
    named = given or os.environ.get(VARIABLE)
    if named:
        yield Path(named)
    elif rank_report.world() > 1:
        yield _agree()
    else:
        folder = reserve()
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()
                folder.parent.rmdir()


def reserve(parent: Path = PARENT) -> Path:
    """Make a new folder named after the time."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError as error:
            if not parent.is_dir():
                raise _cannot_make(folder, error) from error
            number += 1
        except OSError as error:
            raise _cannot_make(folder, error) from error


def _agree() -> Path:
    """The first rank to come names the folder; torchrun's store tells the others, also after a restart."""
    name = PARENT / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=300))
        return Path(store.compare_set("scatterfold/run_dir", "", str(name)).decode())
    if "SLURM_JOB_ID" in os.environ:
        return PARENT / f"slurm_{os.environ['SLURM_JOB_ID']}"
    raise ConfigError("run_dir=null, but the ranks cannot agree on a folder without torchrun, allowed: run_dir=DIR")


def _cannot_make(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"run_dir={folder} cannot be made ({error.strerror}), allowed: a folder that can be written")
