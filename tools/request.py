"""What a user typed after `scatterfold train`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..kernels.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """What the user typed after `scatterfold train`."""

    overrides: tuple[str, ...] = ()
    multirun: bool = False
    show: str | None = None
    resolve: bool = False
    package: str | None = None
    config_path: Path | None = None
    config_name: str = "config"
    config_dir: Path | None = None

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Request:
        """Read flags and overrides, in any order. Raises: ConfigError for an unknown flag."""
        given = _parser().parse_intermixed_args(list(argv))
        path, name = given.config_path, given.config_name
        if path is not None:
            path = _existing_folder("--config-path", path)
            if not (path / f"{name}.yaml").is_file():
                raise ConfigError(f"--config-path {given.config_path} has no {name}.yaml, allowed: a folder with one")
        return cls(
            overrides=tuple(given.overrides),
            multirun=given.multirun,
            show=given.cfg,
            resolve=given.resolve,
            package=given.package,
            config_path=path,
            config_name=name,
            config_dir=_existing_folder("--config-dir", given.config_dir) if given.config_dir else None,
        )

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that say where the configuration comes from, for a process that composes it again."""
        flags: list[str] = []
        if self.config_path is not None:
            flags += ["--config-path", str(self.config_path)]
        if self.config_name != "config":
            flags += ["--config-name", self.config_name]
        if self.config_dir is not None:
            flags += ["--config-dir", str(self.config_dir)]
        return tuple(flags)

    def value_of(self, key: str) -> str | None:
        """What the overrides give for `key`, as typed; None if they do not."""
        for override in reversed(self.overrides):
            name, equals, value = override.partition("=")
            if equals and name.lstrip("+") == key:
                return value
        return None


def _existing_folder(flag: str, text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"{flag} {text} is no folder, allowed: an existing folder")
    return path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}, allowed: see scatterfold train --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="scatterfold train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn", default="config")
    parser.add_argument("--config-dir", "-cd")
    return parser
