"""Where figures go: metrics.jsonl and experts.jsonl always, Weights & Biases and TensorBoard by configuration."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from ...kernels import ConfigError
from .run_folder import RunFolder
from .settings import LoggerSettings

Record = Mapping[str, Any]


class Sink(Protocol):
    """Takes what the loop measures. A record has a `step` and figures."""

    def log(self, record: Record) -> None: ...

    def log_experts(self, step: int, layers: list[dict[str, Any]]) -> None: ...

    def close(self, failed: bool = False) -> None: ...


class MetricSinks:
    """Several sinks as one; none on the ranks that only compute."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def log(self, record: Record) -> None:
        for sink in self._sinks:
            sink.log(record)

    def log_experts(self, step: int, layers: list[dict[str, Any]]) -> None:
        for sink in self._sinks:
            sink.log_experts(step, layers)

    def close(self, failed: bool = False) -> None:
        for sink in self._sinks:
            sink.close(failed)


def open_sinks(settings: LoggerSettings, folder: RunFolder, config: Mapping[str, Any], step: int) -> MetricSinks:
    """Open what the settings ask for, for a run that stands at `step`; call it on the main rank only."""
    sinks: list[Sink] = [JsonLines(folder)]
    if settings.tensorboard:
        sinks.append(TensorBoard(folder.path / "tensorboard", step))
    if settings.wandb != "disabled":
        sinks.append(WeightsAndBiases(settings, folder, config))
    return MetricSinks(sinks)


class JsonLines:
    """One JSON object a line, on the disk as soon as it is known; a value that is not finite becomes null."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._metrics = self._open(folder.metrics)
        self._experts: TextIO | None = None

    def log(self, record: Record) -> None:
        self._write(self._metrics, self._folder.metrics, record)

    def log_experts(self, step: int, layers: list[dict[str, Any]]) -> None:
        if self._experts is None:
            self._experts = self._open(self._folder.experts)
        self._write(self._experts, self._folder.experts, {"step": step, "layers": layers})

    def close(self, failed: bool = False) -> None:
        for file in (self._metrics, self._experts):
            if file is not None:
                file.close()

    def _open(self, path: Path) -> TextIO:
        with self._folder.writing(path):
            return open(path, "a", encoding="utf-8")  # stays open as long as the run

    def _write(self, file: TextIO, path: Path, record: Record) -> None:
        with self._folder.writing(path):
            file.write(json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False) + "\n")
            file.flush()


class TensorBoard:
    """Scalars for TensorBoard under RUN/tensorboard."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events after the checkpoint that a run resumes from are hidden.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def log_experts(self, step: int, layers: list[dict[str, Any]]) -> None:
        for name, value in _layer_scalars(layers).items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool = False) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Figures for Weights & Biases.

    The run keeps its own step (wandb's may not go back after a resume), and its id in RUN/wandb_id, under which an
    online run goes on after a resume. An offline run starts another offline folder of the same id.
    """

    def __init__(self, settings: LoggerSettings, folder: RunFolder, config: Mapping[str, Any]) -> None:
        import wandb
        from wandb.errors import Error

        id_file = folder.path / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:8]
        try:
            self._run = wandb.init(
                mode=settings.wandb,  # type: ignore[arg-type]
                project=settings.project,
                # wandb's own variables, which a sweep sets for its trials; wandb reads them once a process, and only
                # where no name is given.
                name=settings.name or os.environ.get("WANDB_NAME") or folder.path.name,
                group=settings.group or os.environ.get("WANDB_RUN_GROUP"),
                tags=list(settings.tags),
                id=run_id,
                resume="allow",
                dir=str(folder.path),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Error as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(
                f"logger.wandb={settings.wandb} could not start ({first_line}), allowed: disabled, offline, or online "
                "after `wandb login`"
            ) from error
        id_file.write_text(run_id + "\n")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        self._run.log({**_scalars(record), "step": record["step"]})

    def log_experts(self, step: int, layers: list[dict[str, Any]]) -> None:
        self._run.log({**_layer_scalars(layers), "step": step})

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: Record) -> dict[str, float]:
    """The figures of a record, grouped as `train/…` and `valid/…` where they have no group of their own."""
    group = "valid" if "valid_loss" in record else "train"
    return {
        name if "/" in name else f"{group}/{name}": value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float)
    }


def _layer_scalars(layers: list[dict[str, Any]]) -> dict[str, float]:
    """A handful of figures a layer; loads of single experts would drown a dashboard and are in experts.jsonl."""
    return {
        f"layer_{layer['layer']}/{name}": value
        for layer in layers
        for name, value in layer.items()
        if name != "layer" and isinstance(value, int | float)
    }
