"""How Megatron-Core spreads a model over a layout: what it is told, and what it cannot do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ....kernels.errors import ConfigError
from ...layout import ResolvedLayout
from ...meshes import ALONE, Meshes
from ...pipeline.stages import PipelineSchedule
from ...plan import ShardingPlan
from ...process import Process
from ..base import Job, check_not_compiled, check_precision
from . import library
from .optimizer import make_optimizers
from .part import MegatronPart
from .training import MegatronTraining

SCHEDULES = ("1f1b", "interleaved")
_TORCH = "or engine=torch"


class MegatronCoreEngine:
    """Megatron-Core's data parallelism, distributed optimizer and pipeline schedules under our configuration.

    It trains parts that are modules of Megatron's and know their tensors under our names (`MegatronPart`), made after
    `library.start`; which model they are is a matter of the floor above. All data ranks of the layout are one group,
    over which the distributed optimizer cuts what AdamW remembers and the float32 parameters (as ZeRO's stage 1), so
    `layout.dp_shard` stays 1.

    Args:
        pipeline_schedule: 1f1b or interleaved. For pp > 1.
        virtual_stages: parts of the model on each rank; None for as many as the schedule is meant for. For pp > 1.
        bucket_mb: size of the messages in which gradients travel, in MiB, where `overlap` sends them early.
        overlap: reduce gradients while the backward pass goes on.
        native_checkpoints: write Megatron's distributed checkpoint beside each of ours, for its tools.

    Raises: ConfigError for a bucket size that is not above 0, or a schedule that Megatron does not have.
    """

    def __init__(
        self,
        pipeline_schedule: str = "1f1b",
        virtual_stages: int | None = None,
        bucket_mb: float = 25.0,
        overlap: bool = False,
        native_checkpoints: bool = False,
    ) -> None:
        self.schedule = PipelineSchedule(pipeline_schedule, virtual_stages)
        if pipeline_schedule not in SCHEDULES:
            raise ConfigError(
                f"engine.pipeline_schedule={pipeline_schedule} with engine=megatron, which has no such schedule, "
                f"allowed: {', '.join(SCHEDULES)}, {_TORCH}"
            )
        if not bucket_mb > 0:
            raise ConfigError(f"engine.bucket_mb={bucket_mb} is out of range, allowed: above 0")
        self.bucket_mb = bucket_mb
        self.overlap = overlap
        self.native_checkpoints = native_checkpoints

    def check(self, layout: ResolvedLayout, job: Job) -> None:
        """Say before the start what cannot run.

        Raises: ConfigError that names the field, and the engine that can.
        """
        if not job.on_gpu:
            raise ConfigError(
                "engine=megatron needs CUDA, and this run is on the CPU, allowed: engine=torch, or engine=deepspeed"
            )
        library.check_installed()
        if layout.dp_shard > 1:
            raise ConfigError(
                f"layout.dp_shard={layout.dp_shard} with engine=megatron, whose distributed optimizer cuts over all "
                f"data ranks anyway, allowed: layout.dp_shard=1, {_TORCH}"
            )
        check_not_compiled(job.compile, "megatron")
        if self.native_checkpoints and find_spec("psutil") is None:
            raise ConfigError(
                "engine.native_checkpoints=true needs psutil, with which Megatron writes and which is not installed, "
                "allowed: pip install psutil, or engine.native_checkpoints=false"
            )
        self.schedule.check(layout.pp, job.micro_batches, job.checkpointing, job.compile)

    def prepare(
        self,
        model: Any,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        process: Process,
        meshes: Meshes = ALONE,
        plan: ShardingPlan | None = None,
        precision: str = "fp32",
        compile: bool = False,
        deterministic: bool = False,
        seed: int = 0,
    ) -> MegatronTraining:
        """Wrap the parts in Megatron's DDP and make its optimizers; arguments as at `TorchEngine.prepare`.

        fp32 is what it is there. bf16 is Megatron's: parameters in bfloat16 (but the router's), gradients in float32,
        and in the optimizer float32 parameters, which are what a checkpoint of ours holds.

        Args:
            model: a part, or this rank's stages in order, as `schedule.stages_of` numbers them, on the device.
            plan: not read: the parts are cut already.

        Raises: ConfigError for an unknown precision, or an optimizer that Megatron cannot cut.
        """
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        check_precision(precision)
        check_not_compiled(compile, "megatron")
        # Its slices of float32 parameters are views, whose gradients torch thinks nobody meant to read.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        parts: Sequence[MegatronPart] = list(model) if isinstance(model, Sequence) else [model]
        if deterministic:
            torch.use_deterministic_algorithms(True)
        told = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self.overlap,
            use_distributed_optimizer=True,
            bucket_size=max(1, int(self.bucket_mb * 2**20) // 4),
        )
        chunks = [
            DistributedDataParallel(part.module.config, told, part, disable_bucketing=number > 0)  # type: ignore[arg-type]
            for number, part in enumerate(parts)
        ]
        training = MegatronTraining(
            parts,
            chunks,
            make_optimizers(chunks, parts, make_optimizer, precision),
            meshes=meshes,
            device=process.device,
            native=self.native_checkpoints,
        )
        if precision == "bf16":  # the float32 parameters were made from those in bfloat16
            training.reset_parameters(seed)
        return training
