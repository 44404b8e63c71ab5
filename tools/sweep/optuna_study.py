"""What `hydra/sweeper=optuna` needs beyond Hydra's plugin, so that a study goes on as every other sweep does.

The plugin keeps a study in memory unless told otherwise, adds `n_trials` to it each time, and forgets trials that a
signal stopped. Here the study lies in SWEEP/optuna.db, `n_trials` is how many it has in all, and stopped trials are
asked for again, which finds their folders and their checkpoints.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels.errors import ConfigError
from ..errors import one_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

INTERRUPTED = "interrupted"


def prepare_study(config: DictConfig, folder: Path) -> bool:
    """Set the optuna sweeper of a configuration to go on with the study of its sweep folder; of others, do nothing.

    Returns: whether there are trials left to run.
    Raises: ConfigError for settings that cannot be, and for a database that cannot be opened.
    """
    from omegaconf import read_write

    sweeper = config.hydra.sweeper
    if "hydra_optuna_sweeper" not in str(sweeper._target_):
        return True
    _check(sweeper)
    if sweeper.storage is not None and not isinstance(sweeper.storage, str):
        return True  # an object of optuna's, which is the user's to keep
    with read_write(config.hydra):
        if sweeper.storage is None:
            folder.mkdir(parents=True, exist_ok=True)
            sweeper.storage = f"sqlite:///{folder.absolute() / 'optuna.db'}"
        sweeper.study_name = sweeper.study_name or folder.name
        study = _open(str(sweeper.storage), str(sweeper.study_name))
        in_all, sweeper.n_trials = sweeper.n_trials, max(0, sweeper.n_trials - _done(study))
        if sweeper.sampler.get("seed") is not None:
            sweeper.sampler.seed += len(study.trials)  # the same seed would draw the same trials again
    if not sweeper.n_trials:
        print(f"sweep {folder}: the study has its {in_all} trials; raise hydra.sweeper.n_trials to go on", flush=True)
    return sweeper.n_trials > 0


def _check(sweeper: DictConfig) -> None:
    for name in ("n_trials", "n_jobs"):
        if not isinstance(sweeper[name], int) or sweeper[name] < 1:
            raise ConfigError(f"hydra.sweeper.{name}={sweeper[name]} is too small, allowed: 1 or more")
    if "minimize" not in str(sweeper.direction):
        raise ConfigError(
            f"hydra.sweeper.direction={sweeper.direction} is no way to choose by validation loss, allowed: minimize"
        )


def _open(storage: str, name: str) -> Any:
    import optuna  # pyright: ignore[reportMissingImports], an extra

    optuna.logging.set_verbosity(logging.WARNING)
    try:
        return optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
    except Exception as error:
        reason = one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        raise ConfigError(
            f"hydra.sweeper.storage={storage} cannot be opened ({reason}), allowed: a database such as sqlite:///FILE.db"
        ) from error


def _done(study: Any) -> int:
    """How many trials a study has, those aside that a signal stopped: they are put in front of the next ones."""
    from optuna.trial import TrialState  # pyright: ignore[reportMissingImports]

    done = 0
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING:
            study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
            study.tell(trial.number, state=TrialState.FAIL)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # optuna 2 calls it experimental; it is still there in optuna 4
                study.enqueue_trial(trial.params)
        elif trial.state.is_finished() and INTERRUPTED not in trial.user_attrs:
            done += 1
    return done
