"""How DeepSpeed spreads a model over a layout: what it is told, and what it cannot do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ....kernels.errors import ConfigError
from ...layout import ResolvedLayout
from ...meshes import ALONE, Meshes
from ...pipeline.stages import PipelineSchedule
from ...plan import ShardingPlan, cut_parameters, is_meta
from ...process import Process
from ..base import Job, check_not_compiled, check_precision
from . import library
from .experts import Cut, localise, mark_experts, split_groups
from .native import experts_as_its_own
from .partition import gather_whole_blocks, in_whole_shapes, make_partitioned
from .settings import Offload, check_agrees, make_config, owned_keys, read_json
from .training import DeepSpeedTraining
from .views import GatheredViews

STAGES = (0, 1, 2, 3)
_TORCH = "or engine=torch"


class DeepSpeedEngine:
    """DeepSpeed's ZeRO (1910.02054) under our configuration; `prepare` does it, as at `TorchEngine`.

    All ranks of the layout are one ZeRO group, and `zero_stage` says what is cut over it, so `layout.dp_shard` stays 1.
    Experts may be spread (`layout.ep`) with stages 0 to 2: ZeRO then cuts them over the ranks that hold the same ones.

    Args:
        zero_stage: 0 copies everything; 1 cuts the optimizer, 2 the gradients too, 3 the parameters too.
        offload_optimizer: where the optimizer's memory lies, and the parameters that it updates: none (on the device),
            cpu (stages 1 to 3) or nvme (stage 3).
        offload_parameters: where slices of parameters lie: none, cpu or nvme (stage 3).
        nvme_path: a folder on a fast disk, for nvme.
        bucket_mb: size of the messages in which gradients travel, in MiB.
        overlap: reduce gradients while the backward pass goes on.
        config: a DeepSpeed JSON to merge in.
        native_checkpoints: write DeepSpeed's own checkpoint beside each of ours, for its tools. We never read it: it is
            pickled.

    Raises: ConfigError for a value out of range, or a file that cannot be read.
    """

    def __init__(
        self,
        zero_stage: int = 1,
        offload_optimizer: str = "none",
        offload_parameters: str = "none",
        nvme_path: Path | None = None,
        bucket_mb: float = 25.0,
        overlap: bool = False,
        config: Path | None = None,
        native_checkpoints: bool = False,
    ) -> None:
        if zero_stage not in STAGES:
            raise ConfigError(f"engine.zero_stage={zero_stage} is unknown, allowed: {', '.join(map(str, STAGES))}")
        if not bucket_mb > 0:
            raise ConfigError(f"engine.bucket_mb={bucket_mb} is out of range, allowed: above 0")
        self.zero_stage = zero_stage
        self.offload = Offload(zero_stage, offload_optimizer, offload_parameters, nvme_path)
        self.bucket_mb = bucket_mb
        self.overlap = overlap
        self.config = config
        self.native_checkpoints = native_checkpoints
        self.raw = {} if config is None else read_json(config)
        self.schedule = PipelineSchedule()

    def check(self, layout: ResolvedLayout, job: Job) -> None:
        """Say before the start what cannot run.

        Raises: ConfigError that names the field, and what can; or the key of the JSON that contradicts ours.
        """
        library.check_installed()
        for name in ("pp", "cp", "tp", "etp"):
            size = getattr(layout, name)
            if size > 1:
                raise ConfigError(
                    f"layout.{name}={size} with engine=deepspeed, which spreads data and experts only, "
                    f"allowed: layout.{name}=1, {_TORCH}"
                )
        if layout.dp_shard > 1:
            raise ConfigError(
                f"layout.dp_shard={layout.dp_shard} with engine=deepspeed, where engine.zero_stage says what is cut "
                f"over all ranks, allowed: layout.dp_shard=1, {_TORCH}"
            )
        if layout.ep > 1 and self.zero_stage == 3:
            raise ConfigError(
                f"layout.ep={layout.ep} with engine=deepspeed and engine.zero_stage=3, which cuts all parameters over "
                f"the same ranks, allowed: engine.zero_stage=0, 1 or 2, {_TORCH}"
            )
        check_not_compiled(job.compile, "deepspeed")
        if self.offload.uses_disk and not job.on_gpu:
            raise ConfigError(
                "engine.offload_optimizer or engine.offload_parameters=nvme needs a GPU (it has not been run on CPUs), "
                "and this run is on the CPU, allowed: none or cpu"
            )
        if self.config is not None:
            owned = owned_keys(self.zero_stage, self.offload, self.bucket_mb, self.overlap, job, layout.world)
            check_agrees(self.config, self.raw, owned)

    def prepare(
        self,
        model: nn.Module | Sequence[nn.Module],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        process: Process,
        meshes: Meshes = ALONE,
        plan: ShardingPlan | None = None,
        precision: str = "fp32",
        compile: bool = False,
        deterministic: bool = False,
        seed: int = 0,
    ) -> DeepSpeedTraining:
        """Spread the model and make its optimizer; arguments as at `TorchEngine.prepare`.

        bf16 is what it is there: float32 parameters and torch.autocast. Parameters and gradients travel in float32.

        Raises: ConfigError for an unknown precision, a missing library, or a model that has nothing to learn.
        """
        check_precision(precision)
        check_not_compiled(compile, "deepspeed")
        deepspeed = library.load(process)
        if self.offload.uses_disk:
            library.check_disk()
        (part,) = [model] if isinstance(model, nn.Module) else model
        plan = plan or ShardingPlan()
        if not any(parameter.requires_grad for parameter in part.parameters()):
            raise ConfigError(f"model.frozen leaves nothing to learn, which engine=deepspeed cannot do, {_TORCH}")
        config = make_config(
            self.raw,
            self.zero_stage,
            self.offload,
            self.bucket_mb,
            self.overlap,
            precision,
            on_gpu=process.device.type == "cuda",
        )
        cut_parameters(part, plan, meshes)
        self._fill(deepspeed, part, plan, config, process, seed)
        cuts = localise(part)
        if cuts:
            mark_experts(part, cuts, meshes)
        with in_whole_shapes(part):
            optimizer = make_optimizer(part)
        split_groups(optimizer)
        if deterministic:
            torch.use_deterministic_algorithms(True)
        engine = _start(deepspeed, part, optimizer, config, cuts, meshes.layout.ep)
        return DeepSpeedTraining(
            engine,
            part,
            optimizer,
            stage=self.zero_stage,
            meshes=meshes,
            device=process.device,
            cuts=cuts,
            native=self.native_checkpoints,
            around_forward=GatheredViews(plan.units).forgotten if self.zero_stage == 3 else contextlib.nullcontext,
        )

    def _fill(
        self,
        deepspeed: ModuleType,
        part: nn.Module,
        plan: ShardingPlan,
        config: dict[str, Any],
        process: Process,
        seed: int,
    ) -> None:
        """Give the model memory on the device and its values; in stage 3, cut it."""
        is_new = is_meta(part)
        if self.zero_stage == 3:
            make_partitioned(deepspeed, part, plan, config, process.device, seed if is_new else None)
            gather_whole_blocks(deepspeed, plan)
        elif is_new:
            part.to_empty(device=process.device)
            part.reset_parameters(seed)  # type: ignore[operator]
        else:
            part.to(process.device)


def _start(
    deepspeed: ModuleType,
    part: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    cuts: Mapping[str, Cut],
    ep: int,
) -> Any:
    """DeepSpeed's engine. It knows its own MoE layers only, and is told that there are experts."""

    class Engine(deepspeed.DeepSpeedEngine):
        def _configure_distributed_model(self, model: nn.Module) -> None:
            self.has_moe_layers = bool(cuts)
            super()._configure_distributed_model(model)

        def save_checkpoint(self, *arguments: Any, **options: Any) -> Any:
            with experts_as_its_own(part, cuts, ep):
                return super().save_checkpoint(*arguments, **options)

        def load_checkpoint(self, *arguments: Any, **options: Any) -> Any:
            with experts_as_its_own(part, cuts, ep):
                return super().load_checkpoint(*arguments, **options)

    return Engine(
        args=None,
        model=part,
        optimizer=optimizer,
        config=config,
        config_class=deepspeed.DeepSpeedConfig(config),
        dist_init_required=False,
    )
