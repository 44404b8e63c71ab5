"""Megatron's distributed optimizers around ours: one for experts, one for all other parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ....kernels.errors import ConfigError
from .part import MegatronPart


def make_optimizers(
    chunks: Sequence[Any],
    parts: Sequence[MegatronPart],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    precision: str,
) -> Any:
    """A ChainedOptimizer of DistributedOptimizers, which cut what AdamW remembers over the ranks with equal parameters.

    Our optimizer makes the groups of parameters with all their options, as for any engine; Megatron's then replaces
    parameters by this rank's slices of them, in float32.

    Args:
        chunks: the parts, wrapped in Megatron's DDP.
        make_optimizer: ours.

    Raises: ConfigError if that is not AdamW, the only one that the distributed optimizer can cut.
    """
    from megatron.core import parallel_state
    from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    whole = make_optimizer(_outline(parts))
    if type(whole) is not torch.optim.AdamW:
        raise ConfigError(
            f"optimizer makes a {type(whole).__name__}, and with engine=megatron the distributed optimizer cuts AdamW "
            "only, allowed: optimizer=adamw, or engine=torch"
        )
    config = OptimizerConfig(
        optimizer="adam",
        lr=whole.defaults["lr"],
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        use_distributed_optimizer=True,
        clip_grad=0.0,  # `MegatronTraining.clip` does it
    )
    state: Any = parallel_state
    ranks = {
        "buffers": (
            state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True),
            state.get_model_parallel_group().rank(),
        ),
        "expert_parallel_buffers": (
            state.get_expert_data_parallel_group(partial_expert_data_parallel=True),
            state.get_expert_tensor_model_pipeline_parallel_group().rank(),
        ),
    }
    made = []
    for buffers, (group, place) in ranks.items():
        own = _restricted(whole, experts=buffers == "expert_parallel_buffers")
        if any(parameters["params"] for parameters in own.param_groups):
            made.append(
                DistributedOptimizer(
                    own,
                    config,
                    None,  # type: ignore[arg-type]
                    create_state,
                    model_chunks=list(chunks),
                    per_model_buffers={number: getattr(chunk, buffers) for number, chunk in enumerate(chunks)},
                    data_parallel_group=group,
                    data_parallel_group_gloo=None,
                    data_parallel_group_idx=place,
                    distributed_optimizer_instance_id=0,
                )
            )
    return ChainedOptimizer(made)


def is_expert(parameter: torch.Tensor) -> bool:
    return not getattr(parameter, "allreduce", True)


def _restricted(whole: torch.optim.AdamW, experts: bool) -> torch.optim.AdamW:
    """The same optimizer for the parameters of experts, or for all others; groups may be empty, but are all there.

    Beside our options stand those by which Megatron tells groups apart in its checkpoints.
    """
    groups = []
    for group in whole.param_groups:
        own = [parameter for parameter in group["params"] if is_expert(parameter) == experts]
        decays = 1.0 if group["weight_decay"] > 0 else 0.0
        marks = {"is_expert_parallel": experts, "wd_mult": decays, "lr_mult": 1.0, "is_decoupled_lr": False}
        # Apart, because it sorts float32 parameters of a group first, and then mistakes one for another when it saves.
        rounded = [parameter for parameter in own if parameter.dtype != torch.float32]
        exact = [parameter for parameter in own if parameter.dtype == torch.float32]
        groups += [{**group, "params": params, **marks} for params in (rounded, exact) if params or not own]
    return torch.optim.AdamW(groups, fused=whole.defaults["fused"])


def create_state(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Let AdamW allocate what it remembers, as if no step had been made."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                at = parameter.device if group["fused"] else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=at)
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)


def _outline(parts: Sequence[MegatronPart]) -> nn.Module:
    """The parameters under their names in modules of torch's, by which our optimizer knows an embedding."""
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    outline = nn.ModuleList()
    for part in parts:
        assert isinstance(part, nn.Module)
        for module in part.modules():
            is_table = isinstance(module, VocabParallelEmbedding)
            copy = nn.Embedding(1, 1, device="meta") if is_table else nn.Module()
            for name, parameter in module.named_parameters(recurse=False):
                copy.register_parameter(name, parameter)
            outline.append(copy)
    return outline
