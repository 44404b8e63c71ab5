"""A training run from its configuration to its report: where all parts are put together.

Read `train` first: it is the whole story. Each line of it is a part that lives in its own file.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...parallel.checkpoint import Checkpointer
from ...parallel.communication.timeouts import naming_timeouts
from ...parallel.communication.watchdog import FIRST_STEP_S, Watchdog
from ...parallel.engines import Engine
from ...parallel.layout import ResolvedLayout
from ...parallel.meshes import Meshes
from ...parallel.process import Process, broadcast, gather, running, together, world_size
from ..data import Data, open_data
from ..interop.open import open_source
from .display import Display, make_display, quantity
from .environment import describe_environment
from .loop import Loop
from .makers import maker_of
from .progress import Progress
from .resume import Start, check_same_data, choose_start
from .router_statistics import RouterStatistics
from .run_folder import RunFolder
from .run_plan import RunPlan
from .seeds import deterministic_algorithms
from .sinks import MetricSinks, open_sinks
from .summary import conclude, header
from .throughput import Meter, device_peak


def to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        completed: False if a signal stopped it before its last step; the same command goes on from there.
        run_dir: where everything about it is.
        step: optimizer steps done.
        valid_loss, bits_per_byte: of the last evaluation; None if there was none yet.
    """

    completed: bool
    run_dir: Path
    step: int
    valid_loss: float | None
    bits_per_byte: float | None


def train(config: Mapping[str, Any], run_dir: Path, tell: Callable[[str], None] = to_stderr) -> RunResult:
    """Train the model that `config` describes, in the folder `run_dir`; run it on every rank.

    Args:
        config: the resolved tree of groups (model, router, experts, dispatcher, data, optimizer, schedule, trainer,
            logger, layout, engine, communication) and `seed`, `resume`, `init_from`,
            `init_optimizer`.
        run_dir: the same on all ranks; a run that is there already goes on, as `resume` says.
        tell: gets one line before the process ends because a rank hangs.

    Raises: ConfigError, DataError, CheckpointError for bad input, before anything is written; NonFiniteError if too
        many steps in a row were not finite.
    """
    plan = RunPlan.from_config(config)
    folder = RunFolder(run_dir)
    layout = plan.resolve_layout(world_size())
    start = choose_start(plan.config, folder)
    with (
        deterministic_algorithms(plan.trainer.deterministic),
        plan.communication.in_environment(run_dir),
        running(plan.trainer.device, plan.communication.meeting_time(plan.trainer.hang_timeout_s)) as process,
        make_display(plan.logger.display, plan.trainer.steps, process.is_main) as display,
    ):
        start = broadcast(start)
        data = open_data_of(plan, layout, process, display)
        meta = describe_checkpoint(plan, data, process)
        check_same_data(start, meta["tokenizer"], meta["data"])
        if start.is_finished(plan.trainer.steps):
            return finished(plan, folder, start, data, process, display)
        if start.rests(plan.trainer.stop_after):
            display.message(rest_message(start.progress().step))
            return result_of(False, folder, start.progress(), start.meta["evaluation"])
        meshes = layout.meshes(process.device.type)
        engine = prepare_engine(plan, process, meshes)
        load_start(engine, start)
        together(lambda: prepare_folder(plan, folder, start, data, meta) if process.is_main else None)
        with contextlib.closing(data.train), writing_metrics(plan, folder, start, process) as sinks:
            record = partial(plan.communication.write_record, run_dir, process.rank)
            watchdog = Watchdog(process, plan.trainer.hang_timeout_s, tell, record, FIRST_STEP_S)
            loop = make_loop(plan, folder, start, data, engine, process, meshes, watchdog, sinks, display, meta)
            display.header(header(plan, folder, start, data, process))
            waiting_time = plan.communication.start_counting(plan.trainer.hang_timeout_s)
            # A save in the background ends before the group does.
            with watchdog, contextlib.closing(loop.checkpointer), naming_timeouts(process, waiting_time, record):
                completed = loop.run()
        evaluation = loop.last_evaluation.record() if loop.last_evaluation else None
        if not completed and plan.trainer.stop_after == loop.progress.step:
            display.message(rest_message(loop.progress.step))
        elif not completed:
            display.message(f"stopped after step {loop.progress.step} and saved; the same command goes on from there")
        elif process.is_main and evaluation:
            conclude(plan, folder, data, loop.progress, evaluation, process, display)
        return result_of(completed, folder, loop.progress, evaluation)


def finished(
    plan: RunPlan, folder: RunFolder, start: Start, data: Data, process: Process, display: Display
) -> RunResult:
    """What to do with a run that has nothing left to do: say so, and conclude it if it was killed before it could."""
    progress, evaluation = start.progress(), start.meta["evaluation"]
    display.message(f"run_dir={folder.path} has done all its {progress.step} steps; raise trainer.steps to go on")
    if process.is_main and not folder.summary.exists():
        conclude(plan, folder, data, progress, evaluation, process, display)
    return result_of(True, folder, progress, evaluation)


def rest_message(step: int) -> str:
    return f"stopped after step {step}, evaluated and saved; trainer.stop_after=null or a later step goes on from there"


def open_data_of(plan: RunPlan, layout: ResolvedLayout, process: Process, display: Display) -> Data:
    """Open the corpora for this rank's share of each batch; the first use of raw text prepares it."""
    said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > 5.0:
            said = time.monotonic()
            display.message(f"preparing data: {done / max(total, 1):.0%} of {quantity(total)} bytes")

    share = layout.data_rank(process.rank), layout.data
    return together(lambda: open_data(plan.data, *share, plan.seed, process.device, progress=say))


def prepare_folder(plan: RunPlan, folder: RunFolder, start: Start, data: Data, meta: dict[str, Any]) -> None:
    """Write what the run folder says about the run before it begins, and forget what a killed run wrote too much."""
    folder.create()
    folder.write_config({**plan.config, "run_dir": str(folder.path)})
    folder.write_json(folder.environment, meta["environment"])
    plan.communication.make_folder(folder.path)
    data.tokenizer.save(folder.path)
    progress = start.progress()
    folder.cut_back(progress.step, progress.evaluated_step)


def prepare_engine(plan: RunPlan, process: Process, meshes: Meshes) -> Engine:
    """Make the model, spread it over the ranks and give it values that depend on the seed only."""
    parts, sharding = maker_of(plan.engine).make_parts(
        plan.model,
        plan.trainer,
        process=process,
        meshes=meshes,
        sequence_length=plan.data.sequence_length,
        seed=plan.seed,
    )
    return plan.engine.prepare(
        parts,
        plan.optimizer,
        process=process,
        meshes=meshes,
        plan=sharding,
        precision=plan.trainer.precision,
        compile=plan.trainer.compile,
        deterministic=plan.trainer.deterministic,
        seed=plan.seed,
    )


def load_start(engine: Engine, start: Start) -> None:
    """Read the checkpoint, or the model of any format, that the run starts from, if there is one."""
    if start.checkpoint is None:
        return
    if not start.weights_only:
        return engine.load(start.checkpoint)
    stored = open_source(start.checkpoint, "init_from")
    engine.load_weights(stored.tensors, stored.source)
    if start.with_optimizer:
        engine.load_optimizer(stored.optimizer, stored.source)


@contextlib.contextmanager
def writing_metrics(plan: RunPlan, folder: RunFolder, start: Start, process: Process):
    """Sinks on the main rank, closed at the end; a run that failed is marked as such."""
    step = start.progress().step
    sinks = together(lambda: open_sinks(plan.logger, folder, plan.config, step) if process.is_main else MetricSinks([]))
    try:
        yield sinks
    except BaseException:
        sinks.close(failed=True)
        raise
    sinks.close()


def make_loop(
    plan: RunPlan,
    folder: RunFolder,
    start: Start,
    data: Data,
    engine: Engine,
    process: Process,
    meshes: Meshes,
    watchdog: Watchdog,
    sinks: MetricSinks,
    display: Display,
    meta: dict[str, Any],
) -> Loop:
    """Hand every part to the loop."""
    trainer = plan.trainer
    return Loop(
        engine=engine,
        process=process,
        meshes=meshes,
        watchdog=watchdog,
        settings=trainer,
        schedule=plan.schedule,
        peak_lr=plan.optimizer.lr,
        batches=data.train,
        valid_batches=data.valid_batches,
        moe_layers=[layer for part in engine.parts for layer in part.moe_layers()],  # type: ignore[operator]
        statistics=RouterStatistics(
            plan.model.moe_layers, plan.model.config.num_experts, process.device, gather if meshes.pp else None
        ),
        checkpointer=Checkpointer(
            folder.checkpoints,
            process=process,
            keep_last=trainer.keep_last,
            keep_best=trainer.keep_best,
            asynchronous=trainer.asynchronous_checkpoints,
        ),
        sinks=sinks,
        display=display,
        meter=Meter(
            plan.model.counts(plan.data.sequence_length).flops_per_token, process.world, device_peak(process.device)
        ),
        checkpoint_meta=meta,
        progress=start.progress(),
        seed=plan.seed,
        expert_every=plan.logger.expert_every,
    )


def describe_checkpoint(plan: RunPlan, data: Data, process: Process) -> dict[str, Any]:
    """What every checkpoint of the run says beside its tensors and its progress."""
    return {
        "seed": plan.seed,
        "config": plan.config,
        "tokenizer": data.tokenizer.spec(),
        "data": data.description,
        "environment": describe_environment(process.device, process.world),
    }


def result_of(
    completed: bool, folder: RunFolder, progress: Progress, evaluation: Mapping[str, float] | None
) -> RunResult:
    """The result as values; the last evaluation is that of the end, if the run got there."""
    return RunResult(
        completed=completed,
        run_dir=folder.path,
        step=progress.step,
        valid_loss=evaluation["valid_loss"] if evaluation else None,
        bits_per_byte=evaluation["bits_per_byte"] if evaluation else None,
    )
