"""Which model a checkpoint of Megatron's holds: by a file of theirs, by its arguments, or by what the user says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ....kernels import CheckpointError, ConfigError
from ..huggingface.config_json import ConfigJson
from ..stored import GROUPS
from .fields import DEFAULTS, from_arguments, from_run_config
from .groups import read_groups

FIELDS = "transformer_config.json"
_RUN_CONFIG = "run_config.yaml"
_ALLOWED = f"{FIELDS} or {_RUN_CONFIG} beside it, arguments of Megatron-LM in it, or describe=FILE with our groups"


def described_groups(describe: str | Path) -> dict[str, Any]:
    """The groups of a YAML file that the user wrote: model, router, experts and dispatcher, as in a run's config.

    Raises: ConfigError if it cannot be read or lacks a group.
    """
    file = Path(describe).expanduser()
    try:
        given = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"describe={file} cannot be read ({error.strerror}), allowed: a YAML file") from None
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"describe={file} is not YAML, allowed: a YAML file with model, router and experts") from None
    given = given if isinstance(given, Mapping) else {}
    groups: dict[str, Any] = {"dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"}}
    for name in GROUPS:
        if name in given:
            groups[name] = given[name]
    for name in ("model", "router", "experts"):
        if not isinstance(groups.get(name), Mapping):
            raise ConfigError(
                f"describe={file} has no {name}, allowed: groups {', '.join(GROUPS)} as in a run's config"
            )
    return groups


def find_fields(weights: Path, common: Mapping[str, Any]) -> ConfigJson:
    """The fields that a checkpoint brings along.

    Args:
        weights: the folder of its tensors.
        common: what it holds besides tensors.

    Raises: CheckpointError if it brings none, or they cannot be read.
    """
    for file in (weights / FIELDS, weights.parent / FIELDS):
        if file.is_file():
            return ConfigJson(file, _json(file), DEFAULTS)
    for file in (weights / _RUN_CONFIG, weights.parent / _RUN_CONFIG):
        if file.is_file() and (found := from_run_config(_yaml(file))):
            return ConfigJson(file, found, DEFAULTS)
    if found := from_arguments(common.get("args")):
        return ConfigJson(weights / "common.pt", found, DEFAULTS)
    raise CheckpointError(f"{weights} does not say which model it holds, allowed: {_ALLOWED}")


def groups_of(fields: ConfigJson) -> dict[str, Any]:
    """Raises: CheckpointError for a field that is missing or wrong, or asks for what we do not have."""
    try:
        return read_groups(fields)
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{fields.file} describes a model that cannot be built: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError):
        raise CheckpointError(f"{file} is damaged: it is not JSON") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object")
    return values


def _yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        raise CheckpointError(f"{file} is damaged: it is not plain YAML") from None
