"""Hydra's, OmegaConf's and YAML's errors in one line that names the override or key, and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..kernels.errors import ConfigError
from .close_match import did_you_mean
from .errors import causes, one_line


def unknown_key(error: Exception) -> str | None:
    """The key of an override that no config has, if that is what the error says."""
    match = re.match(r"Could not override '([^']+)'", str(error))
    return match.group(1).split("@")[0] if isinstance(error, ConfigCompositionException) and match else None


def as_config_error(error: Exception, overrides: Sequence[str]) -> ConfigError | None:
    """Translate what composing raised; None for an error that is not the user's."""
    if isinstance(error, OverrideParseException):
        return _not_an_override(error)
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error)
    for cause in causes(error):
        if isinstance(cause, YAMLError):
            return _bad_yaml(cause)
    if isinstance(error, OmegaConfBaseException):
        key = f"{error.full_key}: " if error.full_key else ""
        return ConfigError(one_line(f"{key}{_first_line(str(error.msg or error))}, allowed: a value that resolves"))
    if isinstance(error, HydraException):
        return _composition(error, overrides)
    if isinstance(error, RuntimeError | ImportError) and "plugin" in str(error).lower():
        return ConfigError(one_line(str(error)))
    if isinstance(error, ValueError) and "Config group override" in str(error):
        empty = next((text for text in overrides if text.partition("=")[2] == "null" and "." not in text), "a group")
        return ConfigError(f"{empty} is no choice, allowed: the name of a file in the group")
    return None


def _not_an_override(error: OverrideParseException) -> ConfigError:
    """A word that Hydra's grammar cannot read."""
    override = error.override
    if override.startswith("-"):
        return ConfigError(f"{override} is an unknown flag, allowed: see scatterfold train --help")
    if "=" not in override:
        return ConfigError(f"{override!r} is not an override, allowed: key=value")
    if "Ambiguous value" in str(error):
        return _sweep_without_multirun(override)
    return ConfigError(
        f"{override} cannot be read ({_first_line(str(error))}), allowed: key=value, and a value with special "
        f"characters in quotes of its own, '{override.partition('=')[0]}=\"VALUE\"'"
    )


def _sweep_without_multirun(override: str) -> ConfigError:
    key, _, value = override.partition("=")
    return ConfigError(
        f"{override} is several values, allowed: -m for a sweep over them, {key}=[{value}] for a list, or "
        f"'{key}=\"{value}\"' for text"
    )


def _unknown_choice(error: MissingConfigException) -> ConfigError:
    """A file that a config group does not have."""
    wanted = error.missing_cfg_file
    if wanted is None:
        return ConfigError(one_line(str(error)))
    group, _, choice = str(wanted).rpartition("/")
    options = sorted(error.options or ())
    file = re.match(r"In '([^']+)'", str(error))
    origin = f" in {file.group(1)}.yaml" if file and file.group(1) not in ("config", "hydra/config") else ""
    if not group:
        return ConfigError(f"--config-name {choice} does not exist, allowed: a file of the configs folder")
    if not options:
        return ConfigError(f"{group}={choice}{origin} does not exist, allowed: a group of the configs folder")
    if group == "hydra/sweeper" and choice == "optuna":
        return ConfigError("hydra/sweeper=optuna is not installed, allowed: basic, or pip install 'scatterfold[sweep]'")
    suggestion = did_you_mean(choice, options)
    return ConfigError(f"{group}={choice}{origin} does not exist{suggestion}, allowed: {', '.join(options)}")


def _composition(error: HydraException, overrides: Sequence[str]) -> ConfigError:
    text = str(error)
    if "Ambiguous value" in text:
        match = re.search(r"argument '([^']+)'", text)
        if match:
            return _sweep_without_multirun(match.group(1))
    cause = next((c for c in causes(error) if isinstance(c, OmegaConfBaseException)), None)
    named = re.search(r"Could not override '([^']+)'|Error merging override (\S+)", text)
    if named is None:
        return ConfigError(one_line(_first_line(text)))
    key = (named.group(1) or named.group(2)).partition("=")[0].lstrip("+~")
    if "No match in the defaults list" in text:
        return ConfigError(
            f"{key}=… chooses a file, but this configuration is a resolved one without groups, allowed: values such as "
            f"{key}.KEY=VALUE"
        )
    typed = next((word for word in overrides if word.partition("=")[0].lstrip("+~") == key), key)
    reason = f" ({_first_line(str(cause.msg or cause))})" if cause is not None else ""
    return ConfigError(one_line(f"{typed} cannot be set{reason}, allowed: a value that the key can hold"))


def _bad_yaml(error: YAMLError) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or _first_line(str(error))
    if mark is None:
        return ConfigError(f"a config file is no YAML ({problem})")
    name = Path(str(mark.name)).name if not str(mark.name).startswith("<") else "a config file"
    return ConfigError(f"{name}, line {mark.line + 1}: {problem}, allowed: valid YAML")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
