"""The default engine: plain torch on one process, DDP for copies, FSDP2 for shards, both folded with experts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ...kernels.errors import ConfigError
from ..layout import ResolvedLayout
from ..meshes import ALONE, Meshes
from ..pipeline.stages import PipelineSchedule
from ..plan import ShardingPlan, cut_parameters, is_meta
from ..process import Process
from .base import Job, check_precision
from .gradients import GradientSums, Groups
from .sharding import gradient_groups, places, shard
from .training import Runner, Sequential, TorchTraining, autocasting


class TorchEngine:
    """How torch spreads a model over a layout; `prepare` does it.

        meshes = layout.resolve(process.world).meshes(process.device.type)
        with torch.device("meta"):
            model = plan.make_model(meshes=meshes)
        engine = TorchEngine().prepare(
            model, AdamW(lr=1e-3), process=process, meshes=meshes, plan=model.sharding_plan(), precision="bf16", seed=0,
        )
        engine.load(newest)     # or engine.load_weights(stored.tensors, stored.source)

    Args:
        reshard_after_forward: free the gathered parameters of a unit after its forward pass and gather them again for
            its backward pass (less memory); False keeps them (less communication). For dp_shard > 1.
        reduce_every_micro_batch: reduce-scatter gradients after each micro-batch, so that no rank ever holds whole
            gradients; False sums micro-batches first and communicates once a step. For dp_shard > 1.
        bucket_mb: size of the messages in which copies sum their gradients, in MiB. For what FSDP does not cut.
        compile_backend: what torch.compile generates code with; aot_eager needs no compiler. For trainer.compile.
        pipeline_schedule: one of `stages.SCHEDULES`. For pp > 1.
        virtual_stages: parts of the model on each rank; None for as many as the schedule is meant for. For pp > 1.

    Raises: ConfigError for a bucket size that is not above 0, or a schedule that does not exist.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        reduce_every_micro_batch: bool = False,
        bucket_mb: float = 25.0,
        compile_backend: str = "inductor",
        pipeline_schedule: str = "1f1b",
        virtual_stages: int | None = None,
    ) -> None:
        if not bucket_mb > 0:
            raise ConfigError(f"engine.bucket_mb={bucket_mb} is out of range, allowed: above 0")
        self.schedule = PipelineSchedule(pipeline_schedule, virtual_stages)
        self.reshard_after_forward = reshard_after_forward
        self.reduce_every_micro_batch = reduce_every_micro_batch
        self.bucket_mb = bucket_mb
        self.compile_backend = compile_backend

    def check(self, layout: ResolvedLayout, job: Job) -> None:
        """Say before the start what cannot run.

        Raises: ConfigError for a pipeline schedule that does not go with the other options.
        """
        self.schedule.check(layout.pp, job.micro_batches, job.checkpointing, job.compile)
        if layout.pp > 1 and self.reduce_every_micro_batch:
            raise ConfigError(
                f"engine.reduce_every_micro_batch=true with layout.pp={layout.pp}, which reduces once a step, "
                "allowed: false"
            )

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
    ) -> TorchTraining:
        """Spread the model and make its optimizer.

        bf16 means the same in every layout: float32 parameters, and autocast for the forward pass. Sharded matrices
        of a unit travel as bfloat16, which is the rounding that autocast would do after the gather; all that autocast
        leaves in float32 (norms and other vectors, the plan's `float32`, what is outside of units) stays float32.

        Args:
            model: on the meta device, to be created part by part with `model.reset_parameters(seed)`; or with its
                values, the same on every rank. Built for its place in `meshes`; with pp > 1 the parts that
                `schedule.stages_of` gives this rank.
            make_optimizer: called with the model after sharding.
            meshes: of all ranks.
            plan: what may be cut where, in all parts.
            compile: torch.compile each unit.
            deterministic: let torch refuse operations that do not give the same bits twice, from here on.

        Raises: ConfigError for an unknown precision or compiler.
        """
        check_precision(precision)
        parts, plan = [model] if isinstance(model, nn.Module) else list(model), plan or ShardingPlan()
        if deterministic:
            _refuse_nondeterminism()
        if compile:
            self._compile(plan.units)
        groups: dict[nn.Parameter, Groups] = {}
        for part in parts:
            groups |= self._spread(part, plan, process, meshes, precision, seed)
        whole = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
        optimizer = make_optimizer(whole)
        _separate_by_mesh(optimizer)
        return TorchTraining(
            parts,
            optimizer,
            runner=self._runner(parts, process, meshes, precision == "bf16"),
            meshes=meshes,
            device=process.device,
            sums=GradientSums({} if _is_copied(meshes) else groups, int(self.bucket_mb * 2**20)),
        )

    def _spread(
        self, part: nn.Module, plan: ShardingPlan, process: Process, meshes: Meshes, precision: str, seed: int
    ) -> dict[nn.Parameter, Groups]:
        """Cut a part, give it values, and say over which groups gradients are left to be summed."""
        has_values = not is_meta(part)
        if has_values:
            part.to(process.device)
        cut_parameters(part, plan, meshes)
        at = places(part, plan, meshes, precision)
        if meshes.layout.dp_shard > 1:
            shard(part, plan, meshes, at, precision, self.reshard_after_forward)
        if not has_values:
            part.to_empty(device=process.device)
            part.reset_parameters(seed)  # type: ignore[operator]
        return gradient_groups(part, meshes, at)

    def _runner(self, parts: Sequence[nn.Module], process: Process, meshes: Meshes, autocast: bool) -> Runner:
        if meshes.pp is not None:
            # Here, because it loads torch.distributed.pipelining, which most layouts do not need.
            from ..pipeline.pipeline import Pipeline

            context = partial(autocasting, autocast, process.device)
            return Pipeline(parts, meshes, self.schedule, process.device, forward_context=context)
        (part,) = parts
        return Sequential(
            self._replicate(part, process) if _is_copied(meshes) else part,
            part,
            device=process.device,
            autocast=autocast,
            reduce_always=self.reduce_every_micro_batch,
        )

    def _compile(self, units: Sequence[nn.Module]) -> None:
        backends = torch.compiler.list_backends(exclude_tags=())
        if self.compile_backend not in backends:
            allowed = ", ".join(sorted(backends))
            raise ConfigError(f"engine.compile_backend={self.compile_backend!r} is unknown, allowed: {allowed}")
        for unit in units:
            unit.compile(backend=self.compile_backend)

    def _replicate(self, model: nn.Module, process: Process) -> nn.Module:
        # Router biases are updated from global counts, so every copy has the same without sending them. torch 2.13
        # renamed the option.
        known = inspect.signature(DistributedDataParallel).parameters
        synced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        wrapper = DistributedDataParallel(
            model,
            device_ids=[process.device] if process.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.bucket_mb,  # type: ignore[arg-type]
            **{synced: False},  # type: ignore[arg-type]
        )
        wrapper.register_comm_hook(None, _sum_bucket)
        return wrapper


def _is_copied(meshes: Meshes) -> bool:
    """Whether every rank holds the whole model and nothing else, which is what DDP is for."""
    layout = meshes.layout
    return layout.dp_replicate == layout.world > 1 and layout.ep * layout.etp == 1


def _refuse_nondeterminism() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _sum_bucket(state, bucket):  # DDP compares annotations with its own classes and refuses strings
    """DDP's reduction as a plain sum, where its own would divide by the number of copies."""
    summed = dist.all_reduce(bucket.buffer(), async_op=True)
    return summed.get_future().then(lambda future: future.value()[0])  # type: ignore[union-attr]


def _separate_by_mesh(optimizer: torch.optim.Optimizer) -> None:
    """Split parameter groups whose parameters are on several meshes, which torch's fused updates cannot do together."""
    for group in list(optimizer.param_groups):
        by_mesh: dict[object, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
        if not by_mesh:
            continue
        first, *others = by_mesh.values()
        group["params"] = first
        for parameters in others:
            optimizer.add_param_group({**{key: group[key] for key in group if key != "params"}, "params": parameters})
