"""Writing a model as a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ....kernels import ConfigError
from ....parallel.checkpoint.lazy import LazyTensor
from ...build import ModelPlan
from ..shards import write_json, write_shards
from ..stored import StoredModel
from .architecture import Architecture
from .architectures import ARCHITECTURES
from .config_json import CONFIG
from .misfit import Misfit
from .tokenizer import TOKENIZER, write_tokenizer

# Keys of a config.json that do not go along: they describe the file they came from, or what its class is.
_OWN = (
    *("architectures", "model_type", "auto_map", "torch_dtype", "dtype", "initializer_range", "_name_or_path"),
    "quantization_config",  # what is written is not quantised
)


def choose_architecture(groups: Mapping[str, Any], preferred: str | None = None) -> Architecture:
    """The architecture that says exactly what a model computes.

    Args:
        groups: model, router, experts and dispatcher.
        preferred: taken if it fits, before the others in the order of their names.

    Raises: ConfigError that names the first field that does not fit each, if none does.
    """
    plan = ModelPlan.from_config(groups)
    names = sorted(ARCHITECTURES, key=lambda name: (name != preferred, name))
    misfits = []
    for name in names:
        try:
            ARCHITECTURES[name].write_config(plan)
            return ARCHITECTURES[name]
        except Misfit as misfit:
            misfits.append(misfit)
    shown = ", ".join(f"{misfit.model_type} ({misfit.named})" for misfit in misfits)
    raise ConfigError(
        f"no architecture of Hugging Face fits this model: {shown}; allowed: a model that one of them fits"
    )


def write_huggingface(
    stored: StoredModel,
    folder: Path,
    max_shard_bytes: int,
    architecture: str | None = None,
    fused: bool = False,
    rank: int = 0,
    world: int = 1,
) -> tuple[str, ...]:
    """Write a model into an existing, empty folder that `AutoModelForCausalLM` loads; returns names of weight files.

    What only training uses and Hugging Face cannot say is left out: the step, the optimizer's state, z-loss, jitter
    (but for Mixtral), the capacity in training, balance losses over sequences or the global batch, frozen parameters.

    Args:
        max_shard_bytes: of tensors in one file.
        architecture: a model_type; None for the one the model came from if it still fits, else one that does.
        fused: experts as 3-D keys, as transformers holds them in memory, instead of one key an expert and matrix, which
            all readers know.
        rank, world: every rank writes its share of the files, rank 0 what is small.

    Raises: ConfigError for an architecture that is unknown, or that the model does not fit, with the field, its value
        and what is allowed; OSError as any writing does; CheckpointError if the source cannot be read.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture={architecture} is unknown, allowed: {', '.join(ARCHITECTURES)}")
    plan = stored.plan()
    origin = stored.origin.get("model_type")
    chosen = choose_architecture(stored.config, origin) if architecture is None else ARCHITECTURES[architecture]
    hf = chosen.write_config(plan)
    tensors = write_tensors(chosen, plan, hf, stored.tensors, fused)
    files = write_shards(folder, tensors, max_shard_bytes, rank, world)
    if rank == 0:
        write_json(folder / CONFIG, describe(stored, chosen, hf))
        for name, path in stored.carried.items():
            shutil.copyfile(path, folder / name)
        if TOKENIZER not in stored.carried:
            write_tokenizer(stored.tokenizer, folder)
    return files


def write_tensors(
    architecture: Architecture,
    plan: ModelPlan,
    hf: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    fused: bool = False,
) -> dict[str, LazyTensor]:
    """Their tensors of ours, in the order of the rules."""
    dtype = tensors["embedding.weight"].dtype
    theirs: dict[str, LazyTensor] = {}
    for rule in architecture.tensors(plan, hf):
        layout = rule.layout(fused)
        written = layout.write([tensors[name] for name in rule.names])
        constant = not rule.names
        theirs |= {key: one.to(dtype) if constant else one for key, one in zip(layout.keys, written, strict=True)}
    return theirs


def describe(stored: StoredModel, architecture: Architecture, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json: what the architecture says, and of the one it came with what says nothing about computation."""
    decisive = {key for one in ARCHITECTURES.values() for key in one.defaults}
    kept = {key: value for key, value in stored.origin.items() if key not in decisive and key not in _OWN}
    dtype = _dtype_name(stored.tensors["embedding.weight"].dtype)
    end = None if stored.tokenizer is None else stored.tokenizer.eod
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **special,
        **kept,
        **hf,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
