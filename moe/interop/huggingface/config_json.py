"""Reading a config.json, with errors that name file, key, value and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....kernels import CheckpointError

CONFIG = "config.json"


class ConfigJson(Mapping[str, Any]):
    """The values of a config.json, and behind them the defaults of its architecture.

    Args:
        file: for messages.
        values: of the file.
        defaults: values of keys that the file does not have.
    """

    def __init__(self, file: Path, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.file = file
        self.values_given = values
        self._all = {**(defaults or {}), **values}

    @classmethod
    def read(cls, folder: Path) -> ConfigJson:
        """Raises: CheckpointError if it is missing or no JSON object."""
        file = Path(folder) / CONFIG
        try:
            values = json.loads(file.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
        except ValueError:
            raise CheckpointError(f"{file} is damaged: it is not JSON") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{file} is damaged: it is not a JSON object")
        return cls(file, values)

    def with_defaults(self, defaults: Mapping[str, Any]) -> ConfigJson:
        return ConfigJson(self.file, self.values_given, defaults)

    def __getitem__(self, key: str) -> Any:
        return self._all[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def refusal(self, key: str, allowed: str) -> CheckpointError:
        """The error for the value of a key, to raise."""
        return CheckpointError(f"{self.file}: {key}={show(self.get(key))} is not supported, allowed: {allowed}")

    def whole(self, key: str, least: int = 0) -> int:
        """A whole number."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(key, f"a whole number, {least} or more")
        return value

    def whole_or_none(self, key: str, least: int = 0) -> int | None:
        return None if self.get(key) is None else self.whole(key, least)

    def real(self, key: str) -> float:
        """A number."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, "a number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; null is false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return bool(value)

    def one_of(self, *keys: str, least: int = 1) -> int:
        """A whole number that may go by several names; where the file has several, they must agree."""
        given = [key for key in keys if self.values_given.get(key) is not None] or [keys[0]]
        found = {key: self.whole(key, least) for key in given}
        if len(set(found.values())) > 1:
            shown = " and ".join(f"{key}={value}" for key, value in found.items())
            raise CheckpointError(f"{self.file}: {shown} contradict each other, allowed: one of them, or the same")
        return found[given[0]]

    def only(self, key: str, *allowed: Any) -> Any:
        """The value of a key of which we can do only some values; a key that is missing or null is fine.

        A number that equals an allowed one is it, but true is not 1.
        """
        value = self.get(key)
        if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            return value
        raise self.refusal(key, ", ".join(show(one) for one in allowed) or "null")

    def _wrong(self, key: str, allowed: str) -> CheckpointError:
        if key not in self:
            return CheckpointError(f"{self.file} has no {key}, allowed: {allowed}")
        return CheckpointError(
            f"{self.file}: {key}={show(self.get(key))} is out of range or of the wrong type, allowed: {allowed}"
        )


def show(value: Any) -> str:
    """A value as JSON shows it, in one short line."""
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 80 else shown[:77] + "..."
