"""Megatron-Core itself: the release that is known, and its process groups, made from our layout."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from ....kernels.errors import ConfigError
from ...layout import ResolvedLayout
from ...process import Process

KNOWN = "0.16"  # whose distributed optimizer `state` looks into
ORDER = "tp-cp-ep-dp-pp"  # of ranks, the nearest first: that of `layout.ResolvedLayout`
_SEEDS = 2**62


def check_installed() -> None:
    """Raises: ConfigError where there is no Megatron-Core, or a release that was not tested."""
    allowed = f"allowed: pip install 'megatron-core=={KNOWN}.*', or engine=torch"
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise ConfigError(
            f"engine=megatron needs the package megatron-core, which is not installed, {allowed}"
        ) from None
    if found.split(".")[:2] != KNOWN.split("."):
        raise ConfigError(f"engine=megatron was made for megatron-core {KNOWN} and finds {found}, {allowed}")


def start(process: Process, layout: ResolvedLayout, virtual_stages: int = 1) -> None:
    """Make Megatron's process groups for a layout; those of an earlier run in this process are forgotten.

    Alone there is no process group of the run, and Megatron gets one of one rank. Every rank must call it.

    Raises: ConfigError for a release of Megatron-Core that is not known.
    """
    check_installed()
    if layout.tp > 1:  # the order of kernels by which Megatron overlaps communication; read when CUDA starts
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a page about Transformer Engine and Apex, which are not there
        from megatron.core import parallel_state
    if not dist.is_initialized():
        backend = "gloo" if process.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[reportPrivateImportUsage]
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=virtual_stages if layout.pp > 1 and virtual_stages > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        order=ORDER,
        create_gloo_process_groups=False,
    )
    seed_generators()


def seed_generators() -> None:
    """Give the generators of random numbers that Megatron keeps beside torch's a seed that follows from torch's.

    Under sequence parallelism layers draw from them. They would go on from step to step, so that a run that is resumed
    would draw other numbers than one that was not stopped.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(torch.initial_seed() % _SEEDS)
