"""What a run says about itself: a header before its first step, a summary and a report after its last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...parallel.process import Process
from ..data import Data, measure_baselines
from ..report import BASELINE_NAMES, write_report
from .display import Display, duration, quantity
from .environment import device_name
from .progress import Progress
from .resume import Start
from .run_folder import RunFolder
from .throughput import Meter, device_peak

if TYPE_CHECKING:
    from ...parallel.layout import ResolvedLayout
    from .run_plan import RunPlan


def describe_run(plan: RunPlan, data: Data, process: Process) -> list[tuple[str, str]]:
    """Model, data, device and layout, in words."""
    config, counts, trainer = plan.model.config, plan.model.counts(plan.data.sequence_length), plan.trainer
    model = f"{config.layers} layers of width {config.width}, {quantity(counts.total)} parameters"
    if plan.model.is_moe:
        model += f", {quantity(counts.active)} of them active for a token, {config.num_experts} experts a layer"
    layout = plan.layout.resolve(process.world)
    batches = data.train
    return [
        ("model", model),
        ("data", describe_data(data.description)),
        (
            "batch",
            f"{batches.global_batch_size} sequences of {plan.data.sequence_length} tokens, "
            f"{batches.micro_batches} micro-batch{'es' if batches.micro_batches > 1 else ''} a process",
        ),
        ("device", f"{process.world} x {device_name(process.device)}, {trainer.precision}"),
        ("layout", _layout_in_words(layout)),
        ("steps", f"{trainer.steps:,} ({quantity(trainer.steps * batches.tokens_per_step)} tokens)"),
    ]


def _layout_in_words(layout: ResolvedLayout) -> str:
    """Copies and shards of the model, and what else is cut."""
    sizes = asdict(layout)
    always = ("dp_replicate", "dp_shard")
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name in always)


def header(plan: RunPlan, folder: RunFolder, start: Start, data: Data, process: Process) -> list[tuple[str, str]]:
    """What a person reads before the first step."""
    rows = [*describe_run(plan, data, process), ("run folder", str(folder.path))]
    if start.checkpoint is not None:
        rows.append(("weights of" if start.weights_only else "goes on from", str(start.checkpoint)))
    return rows


def conclude(
    plan: RunPlan,
    folder: RunFolder,
    data: Data,
    progress: Progress,
    evaluation: dict[str, float],
    process: Process,
    display: Display,
) -> None:
    """Write summary.json and the report of a finished run, and show how it did; call it on the main rank.

    A report that cannot be made is said, and does not make a finished run fail.
    """
    baselines = measure_baselines(data) if plan.trainer.baselines else None
    summary = {
        "completed": True,
        **{name: evaluation[name] for name in ("valid_loss", "perplexity", "bits_per_byte")},
        "best_valid_loss": progress.best_valid_loss,
        "baselines": baselines,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        **overall_speed(plan, progress, process),
        "skipped_steps": progress.skipped,
        "parameters": {
            "total": plan.model.counts(plan.data.sequence_length).total,
            "active": plan.model.counts(plan.data.sequence_length).active,
        },
        "facts": describe_run(plan, data, process),
    }
    folder.write_json(folder.summary, summary)
    lines = [f"trained {progress.step:,} steps in {duration(progress.seconds)}, {progress.skipped} of them skipped"]
    lines += compare(evaluation["bits_per_byte"], baselines)
    if plan.trainer.report:
        lines.append(make_report(folder))
    lines.append(f"run folder: {folder.path}")
    for line in lines:
        display.message(line)


def describe_data(description: Mapping[str, Any]) -> str:
    """Corpora and sizes, in words."""
    names = ", ".join(str(corpus["path"]) for corpus in description["corpora"])
    train, valid = quantity(description["train_tokens"]), quantity(description["valid_tokens"])
    tokenizer = description["tokenizer"]
    return f"{names}: {train} training and {valid} validation tokens ({tokenizer.get('path', tokenizer['kind'])})"


def overall_speed(plan: RunPlan, progress: Progress, process: Process) -> dict[str, float]:
    """Mean speed over the whole run, evaluation and checkpoints left out."""
    flops = plan.model.counts(plan.data.sequence_length).flops_per_token
    return Meter(flops, process.world, device_peak(process.device)).speed(progress.tokens, progress.seconds)


def compare(bits_per_byte: float, baselines: dict[str, float] | None) -> list[str]:
    """The model's bits per byte beside the baselines, worst first."""
    rows = [(BASELINE_NAMES.get(name, name), bits) for name, bits in (baselines or {}).items()]
    rows = sorted([*rows, ("this model", bits_per_byte)], key=lambda row: -row[1])
    width = max(len(name) for name, _ in rows)
    return ["validation text, bits per byte:", *(f"  {name:<{width}}  {bits:.4f}" for name, bits in rows)]


def make_report(folder: RunFolder) -> str:
    try:
        return f"report: {write_report(folder.path)}"
    except Exception as error:  # a finished run must not fail for its pictures
        return f"the report could not be made ({type(error).__name__}: {error}); the run itself is complete"
