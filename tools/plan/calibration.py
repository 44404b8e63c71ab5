"""Calibration files: what `scatterfold plan calibrate` has measured, as devices."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...kernels.errors import ConfigError
from ...moe.estimate.devices import DEVICES, Device, Link, Rates
from ..close_match import did_you_mean

FORMAT = "scatterfold plan calibration 1"


def choose_device(name: str, ranks: int) -> Device:
    """A device of the table by its name, or of a calibration file by its path.

    Raises: ConfigError for what is neither, or a file that is no calibration.
    """
    if name in DEVICES:
        return DEVICES[name]
    path = Path(name)
    if path.is_file():
        return read_device(path, ranks)
    raise ConfigError(
        f"device={name} is unknown{did_you_mean(name, DEVICES)}, allowed: {', '.join(DEVICES)}, or a file that "
        "scatterfold plan calibrate wrote"
    )


def read_device(path: Path, ranks: int) -> Device:
    """The profile of as many ranks, or of the next smaller number that was measured.

    Ranks of one CPU share its cores and its memory, so that each of two reaches less than one alone.
    """
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"format is {document['format']!r}")
        profiles = {int(count): profile for count, profile in document["profiles"].items()}
        chosen = max((count for count in profiles if count <= ranks), default=min(profiles))
        source = f"scatterfold plan calibrate: {path}, {count_words(chosen)}, torch {document['versions']['torch']}"
        return replace(device_of(profiles[chosen]), source=source, measured=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"device={path} is no calibration file ({error}), allowed: what plan calibrate wrote"
        ) from error


def count_words(ranks: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}"


def device_of(profile: dict[str, Any]) -> Device:
    """A device from plain values."""
    nested = {
        "rates": {precision: Rates(**rates) for precision, rates in profile["rates"].items()},
        "inside": {collective: Link(**link) for collective, link in profile["inside"].items()},
        "network": Link(**profile["network"]),
    }
    return Device(**profile | nested)


def document_of(profiles: dict[int, Device], versions: dict[str, Any], conditions: dict[str, Any]) -> dict[str, Any]:
    """The file's content."""
    left_out = ("source", "measured")
    plain = {
        str(count): {key: value for key, value in asdict(device).items() if key not in left_out}
        for count, device in profiles.items()
    }
    return {"format": FORMAT, "versions": versions, **conditions, "profiles": plain}
