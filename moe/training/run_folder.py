"""The files of a run folder: written whole or not at all, and cut back to a checkpoint when a run resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...kernels import ConfigError
from ...parallel.disk import write_whole


class RunFolder:
    """Paths inside a run folder, and the small files in it.

    Raises: ConfigError from every method that writes, if the folder cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.experts = self.path / "experts.jsonl"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report"

    def create(self) -> None:
        """Make the folder and see that files can be written in it."""
        with self.writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".probe"
            probe.write_text("")
            probe.unlink()

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the resolved configuration as YAML."""
        import yaml

        self._replace(self.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def write_json(self, path: Path, value: Any) -> None:
        self._replace(path, json.dumps(value, indent=2, default=str) + "\n")

    def cut_back(self, step: int, evaluated_step: int | None) -> None:
        """Remove the lines that a killed run wrote after the checkpoint from which it now goes on.

        Args:
            step: of the checkpoint.
            evaluated_step: the last step that was evaluated before the checkpoint; the run will evaluate later ones.
        """

        def is_known(record: dict[str, Any]) -> bool:
            last = evaluated_step if "valid_loss" in record else step
            return last is not None and record["step"] <= last

        for path in (self.metrics, self.experts):
            if path.exists():
                kept = [json.dumps(record) + "\n" for record in read_lines(path) if is_known(record)]
                self._replace(path, "".join(kept))

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Say in one line what could not be written."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"run_dir={self.path} cannot be written ({path.name}: {reason})") from error

    def _replace(self, path: Path, text: str) -> None:
        with self.writing(path):
            write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that a kill cut short is left out."""
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records
