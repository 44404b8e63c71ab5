"""Composing a run's configuration with Hydra, and saying in one line what is wrong with it.

Hydra's own entry point prints several lines and leaves with exit code 1, makes an output folder and a log file on
every rank, and starts a sweeper on every rank. So this module uses the composition underneath it: nothing is written,
nothing is printed, and every error is a ConfigError.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from ..kernels.errors import ConfigError
from .close_match import did_you_mean
from .composition_errors import as_config_error, unknown_key
from .init_from import choices_of_folder
from .legal_keys import parameters_of
from .request import Request

T = TypeVar("T")

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PLUGINS = Path(__file__).resolve().parent / "hydra_path"

# What Hydra must do and leave, unless the user says otherwise. As overrides, because a rerun of a finished run's
# config.yaml has no defaults list that could say it.
HYDRA_DEFAULTS = {
    "hydra/launcher": "scatterfold_trials",
    "hydra/hydra_logging": "none",
    "hydra/job_logging": "none",
    "hydra.output_subdir": "null",
    "hydra.sweep.dir": "multirun/${now:%Y-%m-%d}_${now:%H-%M-%S}",
}


class Session:
    """Hydra, pointed at the configs of one request.

    Attributes:
        of_folder: overrides that choose the model of the folder that `init_from` names.
    """

    def __init__(self, hydra: Hydra, request: Request, of_folder: tuple[str, ...] = ()) -> None:
        self.hydra = hydra
        self.request = request
        self.of_folder = of_folder
        own = [f"{key}={value}" for key, value in HYDRA_DEFAULTS.items() if request.value_of(key) is None]
        self.overrides = [*own, *of_folder, *request.overrides]

    def compose(self) -> DictConfig:
        """Compose the whole configuration, Hydra's own part included. Raises: ConfigError."""
        return self._or_config_error(lambda: self._compose_adding(self.overrides)[0])

    def resolve(self, composed: DictConfig) -> dict[str, Any]:
        """The configuration of the run as plain values, interpolations resolved. Raises: ConfigError."""
        if "hydra" in composed:  # for ${hydra:…}; a launcher of Hydra's has set it for its jobs
            HydraConfig.instance().set_config(composed)
        job = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        missing = self._or_config_error(lambda: sorted(OmegaConf.missing_keys(job)))
        if missing:
            raise ConfigError(f"{missing[0]} has no value, allowed: {missing[0]}=VALUE")
        plain = self._or_config_error(lambda: OmegaConf.to_container(job, resolve=True))
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}

    def constant_keys(self) -> set[str]:
        """Keys that the user set to one value for all trials of a sweep."""
        parsed = OverridesParser.create(self.hydra.config_loader).parse_overrides(list(self.request.overrides))
        return {override.get_key_element().lstrip("+~") for override in parsed if not override.is_sweep_override()}

    def typed(self, overrides: Iterable[str]) -> tuple[str, ...]:
        """Those that the user typed: a process that composes them again finds what lies in the folder by itself."""
        return tuple(word for word in overrides if word not in self.of_folder)

    def compose_sweep(self) -> DictConfig:
        """Compose for a sweep, after a trial run with the first of every list of values. Raises: ConfigError."""

        def composed() -> DictConfig:
            parsed = OverridesParser.create(self.hydra.config_loader).parse_overrides(self.overrides)
            samples = [_sample(override) for override in parsed]
            _, accepted = self._compose_adding(samples)
            overrides = [
                text if before == after else f"++{text}"
                for text, before, after in zip(self.overrides, samples, accepted)
            ]
            return self._compose(overrides, RunMode.MULTIRUN)

        config = self._or_config_error(composed)
        tolerated = "max_failure_rate"
        if tolerated in config.hydra.sweeper and self.request.value_of(f"hydra.sweeper.{tolerated}") is None:
            with read_write(config.hydra):
                config.hydra.sweeper[tolerated] = 1.0  # a failing trial does not stop the others
        return config

    def sweep(self, config: DictConfig, task: Callable[[DictConfig], Any]) -> None:
        """Let the configured sweeper run `task`. Raises: ConfigError for trials that do not compose."""

        def run() -> None:
            context = HydraContext(config_loader=self.hydra.config_loader, callbacks=Callbacks(config))
            sweeper = Plugins.instance().instantiate_sweeper(config=config, hydra_context=context, task_function=task)
            words = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
            assert isinstance(words, list)
            sweeper.sweep(arguments=words)

        self._or_config_error(run)

    def show(self) -> None:
        """Print what `--cfg` asks for."""
        request = self.request
        assert request.show is not None
        _, overrides = self._or_config_error(lambda: self._compose_adding(self.overrides))
        self._or_config_error(
            lambda: self.hydra.show_cfg(
                config_name=request.config_name,
                overrides=overrides,
                cfg_type=request.show,  # type: ignore[arg-type]
                package=request.package,
                resolve=request.resolve,
            )
        )

    def _compose(self, overrides: list[str], mode: RunMode) -> DictConfig:
        return self.hydra.compose_config(
            self.request.config_name, overrides, run_mode=mode, with_log_configuration=False
        )

    def _compose_adding(self, overrides: list[str]) -> tuple[DictConfig, list[str]]:
        """Compose; a key that a constructor takes but no YAML file mentions is added (`++`) rather than refused.

        Returns the configuration and the overrides that gave it.
        """
        while True:
            try:
                return self._compose(overrides, RunMode.RUN), overrides
            except Exception as error:
                key = unknown_key(error)
                place = next((i for i, text in enumerate(overrides) if text.partition("=")[0] == key), None)
                base = self._base(overrides) if place is not None else None
                if key is None or place is None or base is None:
                    raise
                if key not in parameters_of(base):
                    raise _unknown(overrides[place], key, base) from error
                overrides = [*overrides[:place], f"++{overrides[place]}", *overrides[place + 1 :]]

    def _base(self, overrides: list[str]) -> dict[str, Any] | None:
        """The configuration with the chosen files and no changed values; None if even that does not compose."""
        try:
            composed = self._compose([text for text in overrides if self._is_choice(text)], RunMode.RUN)
            plain = OmegaConf.to_container(composed, resolve=False)
        except Exception:
            return None
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items() if key != "hydra"}

    def _is_choice(self, override: str) -> bool:
        """Whether an override picks a file of a config group."""
        key = override.partition("=")[0].lstrip("+~")
        return key.startswith("hydra") or bool(self.hydra.config_loader.get_group_options(key))

    def _or_config_error(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except ConfigError:
            raise
        except Exception as error:
            translated = as_config_error(error, self.overrides)
            if translated is None:
                raise
            raise translated from error


def legal_keys(config: dict[str, Any]) -> list[str]:
    """Every key that an override may name: those in the files, and those that the chosen classes take."""
    return sorted({*_flat(config), *parameters_of(config)})


@contextmanager
def session(request: Request) -> Iterator[Session]:
    """Set Hydra up for one request, and take it down again."""
    if str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hydra 1.4 says that 1.5 will not know this any more
        version.setbase("1.3")
    GlobalHydra.instance().clear()
    path = create_config_search_path(f"file://{request.config_path or CONFIGS}")
    if request.config_path is not None:
        path.append("scatterfold", f"file://{CONFIGS}", anchor=SearchPathQuery("main", None))
    if request.config_dir is not None:
        path.append("command-line", f"file://{request.config_dir}", anchor=SearchPathQuery("main", None))
    try:
        hydra = Hydra.create_main_hydra2("scatterfold", path)
        with choices_of_folder(hydra, request, CONFIGS) as of_folder:
            yield Session(hydra, request, of_folder)
    finally:
        GlobalHydra.instance().clear()


def _flat(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            name = f"{prefix}{key}"
            yield name
            yield from _flat(value, f"{name}.")


def _unknown(override: str, key: str, config: dict[str, Any]) -> ConfigError:
    known = legal_keys(config)
    group = key.partition(".")[0]
    siblings = [name.removeprefix(f"{group}.") for name in known if name.startswith(f"{group}.")]
    siblings = [name for name in siblings if "." not in name and name != "_target_"]
    allowed = f"allowed in {group}: {', '.join(siblings)}" if siblings else f"allowed: {', '.join(sorted(config))}"
    return ConfigError(f"{override} is an unknown key{did_you_mean(key, known)}, {allowed}")


def _sample(override: Override) -> str:
    """An override of one value: the first of a list of values, or the override itself."""
    if not override.is_sweep_override():
        return str(override.input_line)
    key = override.get_key_element()
    if override.is_discrete_sweep():
        return f"{key}={next(iter(override.sweep_string_iterator()))}"
    return f"{key}={getattr(override.value(), 'start', None)}"
