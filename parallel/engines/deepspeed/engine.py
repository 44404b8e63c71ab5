"""How DeepSpeed spreads a model over a layout: what it is told, and what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....kernels.errors import ConfigError
from ...layout import ResolvedLayout
from ...meshes import ALONE, Meshes
from ...plan import ShardingPlan, cut_parameters, is_meta
from ...process import Process
from ...stages import PipelineSchedule
from . import library
from .experts import localise, mark_experts, split_groups
from .settings import Offload, make_config
from .training import DeepSpeedTraining

PRECISIONS = ("fp32", "bf16")
STAGES = (0, 1, 2, 3)


class DeepSpeedEngine:
    """DeepSpeed's ZeRO under our configuration; `prepare` does it.

    All data ranks of the layout are one ZeRO group, so `layout.dp_shard` stays 1 and `zero_stage` says what is cut
    over it (ZeRO, 1910.02054, section 5).

    Args:
        zero_stage: 0 copies everything, 1 cuts the optimizer, 2 gradients too, 3 parameters too.
        offload_optimizer: none, cpu or nvme: where the optimizer and its parameters lie (stages 1 to 3; nvme: 3).
        offload_parameters: none, cpu or nvme: where parameters lie that nobody uses now (stage 3).
        nvme_path: a folder on a fast disk, for nvme.
        bucket_mb: size of the messages in which gradients travel, in MiB.
        overlap: reduce gradients while the backward pass goes on (stages 2 and 3).
        config: a DeepSpeed JSON to merge in.

    Raises: ConfigError for a value out of range, or a file that cannot be read or contradicts the rest.
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
    ) -> None:
        if zero_stage not in STAGES:
            raise ConfigError(f"engine.zero_stage={zero_stage} is unknown, allowed: {', '.join(map(str, STAGES))}")
        self.zero_stage = zero_stage
        self.bucket_mb = bucket_mb
        self.overlap = overlap
        self.schedule = PipelineSchedule()

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
        deepspeed = library.load(process)
        (part,), plan = [model] if isinstance(model, nn.Module) else list(model), plan or ShardingPlan()
        has_values = not is_meta(part)
        if has_values:
            part.to(process.device)
        cut_parameters(part, plan, meshes)
        if not has_values:
            part.to_empty(device=process.device)
            part.reset_parameters(seed)  # type: ignore[operator]
        cuts = localise(part, plan)
        mark_experts(part, cuts, meshes)
        optimizer = make_optimizer(part)
        split_groups(optimizer)
        config = make_config(self, precision)
        if self.zero_stage == 3:
            for unit in plan.units:
                deepspeed.utils.set_z3_leaf_module(unit, True)
        engine = _engine_class(deepspeed, bool(cuts))(
            args=None, model=part, optimizer=optimizer, config=config,
            config_class=deepspeed.DeepSpeedConfig(config), dist_init_required=False,
        )
        return DeepSpeedTraining(engine, part, optimizer, stage=self.zero_stage, meshes=meshes, device=process.device, cuts=cuts)


def _engine_class(deepspeed: Any, has_experts: bool) -> type:
    class Engine(deepspeed.DeepSpeedEngine):
        def _configure_distributed_model(self, model):
            self.has_moe_layers = has_experts
            super()._configure_distributed_model(model)
    return Engine
