"""What DeepSpeed is told: our configuration in its words, and a JSON of the user's beside it where they agree."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....kernels.errors import ConfigError
from ..base import Job

AUTO = "auto"  # what Hugging Face's trainer fills in, so their files have it
PLACES = ("none", "cpu", "nvme")

# What would change the run behind the back of our configuration, and what in it does the same.
REFUSED = {
    "scheduler": "schedule=…",
    "tensor_parallel": "layout.tp with engine=torch",
    "sequence_parallel_size": "layout.cp with engine=torch",
    "expert_parallel": "layout.ep",
    "pipeline": "layout.pp with engine=torch",
    "hybrid_engine": "leaving it out",
    "compression_training": "leaving it out",
    "curriculum_learning": "leaving it out",
    "data_efficiency": "leaving it out",
    "zero_optimization.zenflow": "leaving it out",
    "compile": "engine=torch with trainer.compile=true",
}


@dataclass(frozen=True)
class Offload:
    """Where what ZeRO cuts lies while nobody needs it: none (on the device), cpu or nvme.

    Raises: ConfigError for an unknown place, one that the stage does not know, or nvme without a folder.
    """

    stage: int
    optimizer: str = "none"
    parameters: str = "none"
    nvme_path: Path | None = None

    def __post_init__(self) -> None:
        for name, place in (("offload_optimizer", self.optimizer), ("offload_parameters", self.parameters)):
            if place not in PLACES:
                raise ConfigError(f"engine.{name}={place!r} is unknown, allowed: {', '.join(PLACES)}")
            least = 1 if name == "offload_optimizer" and place == "cpu" else 3
            if place != "none" and self.stage < least:
                raise ConfigError(
                    f"engine.{name}={place} with engine.zero_stage={self.stage}, which keeps "
                    f"{'no slices of it' if self.stage == 0 else 'it on the device'}, allowed: engine.zero_stage="
                    f"{'3' if least == 3 else '1, 2, 3'}, or none"
                )
            if place == "nvme" and self.nvme_path is None:
                raise ConfigError(f"engine.{name}=nvme needs engine.nvme_path, allowed: a folder on a fast disk")

    @property
    def uses_disk(self) -> bool:
        return "nvme" in (self.optimizer, self.parameters)

    def entries(self, on_gpu: bool) -> dict[str, Any]:
        """In DeepSpeed's words."""
        found = {}
        for key, place in (("offload_optimizer", self.optimizer), ("offload_param", self.parameters)):
            if place != "none":
                found[key] = {"device": place, "pin_memory": on_gpu}
                if place == "nvme":
                    found[key]["nvme_path"] = str(self.nvme_path)
        return found


def make_config(
    raw: Mapping[str, Any], stage: int, offload: Offload, bucket_mb: float, overlap: bool, precision: str, on_gpu: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration: what it gets from us over what the user's JSON says.

    Sizes of batches are 1 there: DeepSpeed only prints them, for the engine calls it with what the run gives.
    bfloat16 is autocast over float32 parameters, of which no module is exempt from summing gradients in float32.
    """
    elements = max(2, int(bucket_mb * 2**20 / 4) // 2 * 2)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # said before each step
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": elements,
            "allgather_bucket_size": elements,
            "overlap_comm": overlap,
            "contiguous_gradients": True,
            **offload.entries(on_gpu),
        },
    }
    if precision == "bf16":
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    kept = {key: value for key, value in raw.items() if key not in ("optimizer", "train_batch_size", "bf16", "fp16")}
    return _merged({"steps_per_print": 2**31, **_without_auto(kept)}, ours)


def read_json(file: Path) -> dict[str, Any]:
    """Raises: ConfigError if the file cannot be read or is no JSON object."""
    try:
        found = json.loads(Path(file).read_text())
    except OSError as error:
        raise ConfigError(f"engine.config={file} cannot be read: {error.strerror}, allowed: a JSON file") from None
    except ValueError as error:
        raise ConfigError(f"engine.config={file} is no JSON: {error}, allowed: a DeepSpeed configuration") from None
    if not isinstance(found, dict):
        raise ConfigError(f"engine.config={file} holds no object, allowed: a DeepSpeed configuration")
    return found


def check_agrees(file: Path, raw: Mapping[str, Any], owned: Mapping[str, tuple[str, Any]]) -> None:
    """Compare a DeepSpeed JSON with our configuration.

    Args:
        owned: by the path of a key in the JSON, our field of the same meaning and the value that it has in DeepSpeed's
            words.

    Raises: ConfigError that names the key, and both values.
    """
    for path, value in _leaves(raw):
        for refused, instead in REFUSED.items():
            if path == refused or path.startswith(refused + "."):
                raise ConfigError(f"engine.config={file}: {refused} is not for this engine, allowed: {instead}")
        if path in owned and value != AUTO:
            field, expected = owned[path]
            if not _same(value, expected):
                raise ConfigError(
                    f"engine.config={file}: {path}={_show(value)} contradicts {field}, allowed: {_show(expected)}, "
                    f'"{AUTO}", or leaving it out'
                )


def owned_keys(
    stage: int, offload: Offload, bucket_mb: float, overlap: bool, job: Job, ranks: int
) -> dict[str, tuple[str, Any]]:
    """The keys of a DeepSpeed JSON that our configuration decides."""
    bf16 = job.precision == "bf16"
    fixed = "how the engine sums gradients"
    elements = max(2, int(bucket_mb * 2**20 / 4) // 2 * 2)
    keys: dict[str, tuple[str, Any]] = {
        "train_batch_size": _given("data.global_batch_size", job.micro_batch_size * job.micro_batches * ranks),
        "train_micro_batch_size_per_gpu": _given("data.micro_batch_size", job.micro_batch_size),
        "gradient_accumulation_steps": (
            f"data.global_batch_size over {ranks} ranks of data.micro_batch_size={job.micro_batch_size}",
            job.micro_batches,
        ),
        "gradient_clipping": _given("trainer.gradient_clip", job.gradient_clip or 0.0),
        "fp16.enabled": _given("trainer.precision", False, job.precision),
        "bf16.enabled": (
            f"trainer.precision={job.precision}, which keeps parameters in float32 (torch_autocast)",
            False,
        ),
        "torch_autocast.enabled": _given("trainer.precision", bf16, job.precision),
        "torch_autocast.dtype": _given("trainer.precision", "bfloat16", job.precision),
        "torch_autocast.lower_precision_safe_modules": (fixed, []),
        "zero_optimization.stage": _given("engine.zero_stage", stage),
        "zero_optimization.reduce_bucket_size": _given("engine.bucket_mb", elements, bucket_mb),
        "zero_optimization.allgather_bucket_size": _given("engine.bucket_mb", elements, bucket_mb),
        "zero_optimization.overlap_comm": _given("engine.overlap", overlap),
        "zero_optimization.contiguous_gradients": (fixed, True),
        "zero_optimization.offload_optimizer.device": _given("engine.offload_optimizer", offload.optimizer),
        "zero_optimization.offload_param.device": _given("engine.offload_parameters", offload.parameters),
        "gradient_allreduce_op": (fixed, "mean"),
        "prescale_gradients": (fixed, False),
        "gradient_predivide_factor": (fixed, 1.0),
        "communication_data_type": (fixed, "fp32"),
        "managed_gradient_accumulation": (fixed, True),
        "optimizer.type": ("optimizer=adamw", "AdamW"),
    }
    for key in ("offload_optimizer", "offload_param"):
        keys[f"zero_optimization.{key}.nvme_path"] = _given("engine.nvme_path", _text(offload.nvme_path))
    for name in ("lr", "betas", "eps", "weight_decay"):
        value = getattr(job.optimizer, name, None)
        keys[f"optimizer.params.{name}"] = _given(
            f"optimizer.{name}", list(value) if isinstance(value, tuple) else value
        )
    return keys


def _given(field: str, value: Any, shown: Any = None) -> tuple[str, Any]:
    return f"{field}={_show(value if shown is None else shown)}", value


def _leaves(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        full = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, full)
        else:
            yield full, value


def _without_auto(node: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what the file leaves to us."""
    found = {key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in node.items()}
    return {key: value for key, value in found.items() if value != AUTO}


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return one.lower() == other.lower()
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
