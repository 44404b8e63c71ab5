"""The trainer's settings, checked."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ...kernels import ConfigError
from ...parallel.context.attention import CONTEXT_ATTENTION

PRECISIONS = ("fp32", "bf16")
CHECKPOINTING = ("none", "full", "selective")
DEVICES = ("auto", "cpu", "cuda")
WANDB_MODES = ("disabled", "offline", "online")
DISPLAYS = ("auto", "rich", "plain", "none")


@dataclass(frozen=True)
class TrainerSettings:
    """What the `trainer` group of a config holds.

    Attributes:
        steps: optimizer steps of the whole run.
        stop_after: stop after this step, evaluated and saved; the schedule stays that of `steps`, so that a run that
            goes on later is the run that never stopped. None to run to the end.
        precision: fp32, or bf16: parameters and optimizer in float32, matrix products in bfloat16.
        gradient_clip: largest global gradient norm; None to clip nothing.
        activation_checkpointing: none; full: keep each block's input only; selective: keep attention, recompute MLPs.
        activation_offload: keep what the backward pass needs in the memory of the CPU.
        context_attention: for layout.cp above 1: gather (keys and values of all ranks at once, exact with documents,
            everywhere) or ring (from rank to rank, on GPUs).
        compile: torch.compile each block.
        eval_every, checkpoint_every: steps between; 0 for only at the end.
        eval_batches: validation text of an evaluation during the run, in global batches; None for the whole split.
            The evaluation at the end always reads the whole split.
        keep_last: how many of the newest checkpoints stay.
        keep_best: the checkpoint with the lowest validation loss stays too, of those saved right after an evaluation.
        asynchronous_checkpoints: write in the background while training goes on.
        log_every: steps between train lines.
        deterministic: refuse operations that do not give the same bits twice.
        max_skipped_steps: the run stops when this many steps in a row had non-finite values.
        baselines: at the end, measure byte unigram, byte trigram and gzip on the validation text beside the model.
        report: write RUN/report at the end.
        device: auto, cpu or cuda.
        hang_timeout_s: a run of several ranks in which nothing has moved for so long ends, and says which rank stands
            still and where. Longer than the longest evaluation or save; the first step gets two minutes at least.
    """

    steps: int
    stop_after: int | None = None
    precision: str = "fp32"
    gradient_clip: float | None = 1.0
    activation_checkpointing: str = "none"
    activation_offload: bool = False
    context_attention: str = "gather"
    compile: bool = False
    eval_every: int = 0
    eval_batches: int | None = None
    checkpoint_every: int = 0
    keep_last: int = 2
    keep_best: bool = True
    asynchronous_checkpoints: bool = False
    log_every: int = 1
    deterministic: bool = False
    max_skipped_steps: int = 10
    baselines: bool = False
    report: bool = True
    device: str = "auto"
    hang_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        _one_of(self, "trainer", "precision", PRECISIONS)
        _one_of(self, "trainer", "context_attention", tuple(CONTEXT_ATTENTION))
        _one_of(self, "trainer", "activation_checkpointing", CHECKPOINTING)
        _one_of(self, "trainer", "device", DEVICES)
        for name, least in (
            ("steps", 1),
            ("eval_every", 0),
            ("checkpoint_every", 0),
            ("keep_last", 1),
            ("log_every", 1),
            ("max_skipped_steps", 1),
        ):
            _at_least(self, "trainer", name, least)
        if self.stop_after is not None and self.stop_after < 1:
            raise ConfigError(f"trainer.stop_after={self.stop_after} is too small, allowed: null, 1 or more")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise ConfigError(f"trainer.eval_batches={self.eval_batches} is too small, allowed: null, 1 or more")
        if not self.hang_timeout_s > 0:
            raise ConfigError(f"trainer.hang_timeout_s={self.hang_timeout_s} is out of range, allowed: above 0")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ConfigError(f"trainer.gradient_clip={self.gradient_clip} is out of range, allowed: null, above 0")


@dataclass(frozen=True)
class LoggerSettings:
    """What the `logger` group of a config holds: where figures go besides metrics.jsonl.

    Attributes:
        wandb: disabled, offline (files under RUN/wandb, for `wandb sync`) or online.
        project, name, group, tags: of the wandb run; name is the run folder's where it is null.
        tensorboard: write RUN/tensorboard.
        display: rich (a live panel), plain (a line each time), none; auto: rich on a terminal, plain elsewhere.
        expert_every: steps between lines of experts.jsonl; 0 for only the last step.
    """

    wandb: str = "disabled"
    project: str = "scatterfold"
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    tensorboard: bool = False
    display: str = "auto"
    expert_every: int = 10

    def __post_init__(self) -> None:
        _one_of(self, "logger", "wandb", WANDB_MODES)
        _one_of(self, "logger", "display", DISPLAYS)
        _at_least(self, "logger", "expert_every", 0)
        if self.wandb != "disabled" and not find_spec("wandb"):
            raise ConfigError(f"logger.wandb={self.wandb} needs the package wandb, allowed: disabled, or install wandb")
        if self.tensorboard and not find_spec("tensorboard"):
            raise ConfigError(
                "logger.tensorboard=true needs the package tensorboard, allowed: false, or install "
                "scatterfold[tensorboard]"
            )


def _one_of(settings: Any, group: str, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(settings, name)
    if value not in allowed:
        raise ConfigError(f"{group}.{name}={value!r} is unknown, allowed: {', '.join(allowed)}")


def _at_least(settings: Any, group: str, name: str, least: int) -> None:
    value = getattr(settings, name)
    if value < least:
        raise ConfigError(f"{group}.{name}={value} is too small, allowed: {least} or more")
