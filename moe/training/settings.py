"""The trainer's settings, checked."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels import ConfigError

PRECISIONS = ("fp32", "bf16")
CHECKPOINTING = ("none", "full", "selective")


@dataclass(frozen=True)
class TrainerSettings:
    """What the `trainer` group of a config holds.

    Attributes:
        steps: optimizer steps of the whole run.
        precision: fp32, or bf16: parameters and optimizer in float32, matrix products in bfloat16.
        gradient_clip: largest global gradient norm; None to clip nothing.
        activation_checkpointing: none; full: keep each block's input only; selective: keep attention, recompute MLPs.
        compile: torch.compile each block.
        eval_every, checkpoint_every: steps between; 0 for only at the end.
        eval_batches: micro-batches per rank of an evaluation during the run; None for the whole validation split.
            The evaluation at the end always reads the whole split.
        keep_last, keep_best: which checkpoints stay.
        asynchronous_checkpoints: write in the background while training goes on.
        log_every: steps between train lines.
        deterministic: refuse operations that do not give the same bits twice.
        max_skipped_steps: the run stops when this many steps in a row had non-finite values.
        baselines: at the end, measure byte unigram, byte trigram and gzip on the validation text beside the model.
        report: write RUN/report at the end.
        device: auto, cpu or cuda.
    """

    steps: int
    precision: str = "fp32"
    gradient_clip: float | None = 1.0
    activation_checkpointing: str = "none"
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

    def __post_init__(self) -> None:
        self._one_of("precision", PRECISIONS)
        self._one_of("activation_checkpointing", CHECKPOINTING)
        self._one_of("device", ("auto", "cpu", "cuda"))
        for name, least in (
            ("steps", 1),
            ("eval_every", 0),
            ("checkpoint_every", 0),
            ("keep_last", 1),
            ("log_every", 1),
            ("max_skipped_steps", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"trainer.{name}={value} is too small, allowed: {least} or more")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise ConfigError(f"trainer.eval_batches={self.eval_batches} is too small, allowed: null, 1 or more")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ConfigError(f"trainer.gradient_clip={self.gradient_clip} is out of range, allowed: null, above 0")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"trainer.{name}={value!r} is unknown, allowed: {', '.join(allowed)}")
