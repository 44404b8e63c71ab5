"""Writing a model as a distributed checkpoint that Megatron loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from ....kernels import ConfigError
from ....parallel.checkpoint.lazy import LazyTensor
from ...build import ModelPlan
from ..scatterfold import DESCRIPTION, describe
from ..shards import write_json
from ..stored import StoredModel
from .describe import FIELDS
from .fields import to_arguments
from .groups import write_fields
from .keys import layer_keys, stacked_keys
from .locate import COMMON, RELEASE, TRACKER
from .rules import megatron_rules
from .torch_dist import write_torch_dist

_MATRICES = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")


def write_megatron(
    stored: StoredModel,
    folder: Path,
    max_shard_bytes: int,
    stacked: bool = False,
    rank: int = 0,
    world: int = 1,
) -> tuple[str, ...]:
    """Write a model into an existing, empty folder as `release`, the way Megatron-LM looks for one with --load.

    dist_checkpointing loads it into a GPTModel of any tensor, pipeline and expert parallel size. Beside the tensors lie
    the arguments for --use-checkpoint-args, transformer_config.json with the fields of TransformerConfig and GPTModel,
    scatterfold.json and the tokenizer. The optimizer's state is left out.

    Args:
        max_shard_bytes: of a file.
        stacked: layers share keys with a dimension for them, as releases before 0.13 wrote; every layer must be alike.
        rank, world: every rank writes its share of the files, rank 0 what is small.

    Raises: ConfigError that names the first field that Megatron cannot say; OSError as any writing does;
        CheckpointError if the source cannot be read.
    """
    plan = stored.plan()
    fields = write_fields(plan)
    if stacked and 0 < len(plan.moe_layers) < plan.config.layers:
        raise ConfigError("stacked=true with dense and MoE layers in one model, allowed: false")
    weights = folder / RELEASE
    weights.mkdir(exist_ok=True)
    plain: dict[str, LazyTensor] = {}
    for rule in megatron_rules(plan):
        layout = rule.layouts[0]
        plain |= zip(layout.keys, layout.write([stored.tensors[name] for name in rule.names]), strict=True)
    tensors = stacked_keys(plain, plan.config.layers) if stacked else layer_keys(plain)
    files = write_torch_dist(weights, tensors, _empty_states(plan, stacked), max_shard_bytes, rank, world)
    if rank == 0:
        _write_small(stored, folder, fields, stacked)
    return tuple(f"{RELEASE}/{file}" for file in files)


def _write_small(stored: StoredModel, folder: Path, fields: Mapping[str, object], stacked: bool) -> None:
    weights = folder / RELEASE
    dtype = stored.tensors["embedding.weight"].dtype
    arguments = to_arguments(
        fields,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
    )
    content = {
        "non_homogeneous_layers": not stacked,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    common = {"args": arguments, "checkpoint_version": 3.0, "iteration": stored.step, "content_metadata": content}
    torch.save(common, weights / COMMON)
    write_json(weights / FIELDS, fields)
    for name, path in stored.carried.items():
        shutil.copyfile(path, weights / name)
    if stored.tokenizer is not None:
        stored.tokenizer.save(weights)
    write_json(weights / DESCRIPTION, describe(stored))
    (folder / TRACKER).write_text(RELEASE)


def _empty_states(plan: ModelPlan, stacked: bool) -> list[str]:
    """Keys of what modules of theirs keep beside parameters: nothing, but they ask for it."""
    keys = []
    config = plan.config
    for layer in range(config.layers):
        modules = [f"{module}" for module in _MATRICES]
        experts = 0
        if config.is_moe(layer):
            experts = config.num_experts
            shared = [] if config.shared_expert_width is None else ["mlp.shared_experts"]
        else:
            shared = ["mlp"]
        modules += [f"{module}.linear_fc{number}" for module in shared for number in (1, 2)]
        prefix, place = ("decoder.layers", (layer, config.layers)) if stacked else (f"decoder.layers.{layer}", None)
        keys += [_state_key(f"{prefix}.{module}", place) for module in modules]
        for number in (1, 2):
            module = f"{prefix}.mlp.experts.experts.linear_fc{number}"
            keys += [_state_key(module, place, (expert, experts)) for expert in range(experts)]
    return keys


def _state_key(module: str, *places: tuple[int, int] | None) -> str:
    """The key of an object that is one of several: where it is in each dimension, and how many there are."""
    given = [place for place in places if place is not None] or [(0, 1)]
    at, of = (".".join(str(one) for one in side) for side in zip(*given))
    return f"{module}._extra_state/shard_{at}_{of}"
