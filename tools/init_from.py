"""`scatterfold train init_from=DIR` trains the model that lies in DIR, unless the user has chosen another.

The folder's groups become choices that Hydra knows: model=init_from, router=init_from, experts=init_from. So values on
the command line change them as they change any other file of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .request import Request

KEY = "init_from"


@contextmanager
def choices_of_folder(hydra: Hydra, request: Request, configs: Path) -> Iterator[tuple[str, ...]]:
    """The overrides that choose what lies in the folder; none where the user begins with none or chose a model.

    Args:
        configs: the package's own files, among which a user may have put an experiment.

    Raises: CheckpointError, ConfigError or DataError if the folder holds no model that can be opened.
    """
    stated = _Stated.of(hydra, request) if _may_begin_with_folder(request, configs) else None
    source = None if stated is None or stated.chooses("model") else stated.value(KEY)
    if stated is None or not isinstance(source, str):
        yield ()
        return
    from ..moe.training.init_from import GROUPS, groups_of

    run_dir = stated.value("run_dir")
    groups = groups_of(source, Path(run_dir) if isinstance(run_dir, str) else None)
    taken = [group for group in GROUPS if not stated.chooses(group)]
    words = [f"{group}={KEY}" for group in taken]
    if stated.value("data.tokenizer") in (None, "bytes") and not stated.is_typed("data.tokenizer"):
        words += [f"data.{key}={_quoted(value)}" for key, value in groups["data"].items() if value is not None]
    store = ConfigStore.instance()
    for group in taken:
        store.store(group=group, name=KEY, node=groups[group])
    try:
        yield tuple(words)
    finally:
        for group in taken:
            store.repo[group].pop(f"{KEY}.yaml", None)


def _may_begin_with_folder(request: Request, configs: Path) -> bool:
    """False where no word and no file could name a folder: listing the chosen files takes as long as composing."""
    if request.config_path is not None or request.config_dir is not None:
        return True
    if any(KEY in word or "searchpath" in word for word in request.overrides):
        return True
    return any(KEY in path.read_text().replace(f"{KEY}: null", "") for path in configs.rglob("*.yaml"))


class _Stated:
    """What the command line and the files that it chose say, before anything is composed.

    Args:
        typed: overrides of the command line, of a sweep those that do not vary.
        choices: groups of which the command line or an experiment names a file.
        files: the files that make up the configuration, by the node that they fill, in the order in which they count.
    """

    def __init__(self, typed: dict[str, Any], choices: set[str], files: list[tuple[str, DictConfig]]) -> None:
        self._typed = typed
        self._choices = choices
        self._files = files

    @classmethod
    def of(cls, hydra: Hydra, request: Request) -> _Stated | None:
        """None if the words or files are wrong, which composing them will say better."""
        loader = hydra.config_loader
        try:
            parsed = OverridesParser.create(loader).parse_overrides(list(request.overrides))
            listed = loader.compute_defaults_list(request.config_name, _constant(parsed), RunMode.RUN)
            files = [(default.package or "", _body(hydra, default)) for default in listed.defaults]
        except Exception:
            return None
        choices = set(listed.overrides.override_metadata)
        choices |= {override.get_key_element().lstrip("+~") for override in parsed if override.is_sweep_override()}
        typed = {o.get_key_element().lstrip("+"): o.value() for o in parsed if not o.is_sweep_override()}
        return cls(typed, choices, files)

    def is_typed(self, key: str) -> bool:
        """Whether the command line gives a value."""
        return key in self._typed or key in self._choices

    def chooses(self, group: str) -> bool:
        """Whether the command line or an experiment names a file of a group, or a file that is of no group fills it."""
        return group in self._choices or any(package == "" and group in body for package, body in self._files)

    def value(self, key: str) -> Any:
        """The value of a key; None if nothing gives it, or a sweep varies it."""
        if self.is_typed(key):
            return self._typed.get(key)
        found = None
        for package, body in self._files:
            inner = key.removeprefix(f"{package}.") if package else key
            if inner != key or not package:
                given = OmegaConf.select(body, inner)
                found = found if given is None else given
        return found


def _constant(parsed: Sequence[Override]) -> list[str]:
    return [str(override.input_line) for override in parsed if not override.is_sweep_override()]


def _body(hydra: Hydra, default: ResultDefault) -> DictConfig:
    repository = hydra.config_loader.repository  # type: ignore[attr-defined]
    loaded = None if default.config_path is None else repository.load_config(default.config_path)
    return loaded.config if loaded is not None and isinstance(loaded.config, DictConfig) else OmegaConf.create({})


def _quoted(text: Any) -> str:
    escaped = str(text).replace("'", "\\'")
    return f"'{escaped}'"
