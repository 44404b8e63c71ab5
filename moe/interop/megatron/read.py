"""Opening a checkpoint of Megatron's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from ....kernels import CheckpointError, ConfigError
from ....parallel.checkpoint.distributed import open_distributed
from ....parallel.checkpoint.lazy import LazyTensor, narrow
from ...build import ModelPlan
from ...data.tokenizer import Tokenizer, tokenizer_from
from ..huggingface.misfit import demand_experts
from ..scatterfold import DESCRIPTION, read_description
from ..stored import GROUPS, StoredModel, wanted_shapes
from .describe import described_groups, find_fields, groups_of
from .keys import plain_view
from .locate import find_weights
from .router import NAME
from .rules import EMBEDDING, HEAD, megatron_rules
from .safe import read_common, read_index

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def open_megatron(folder: Path, describe: str | Path | None = None) -> StoredModel:
    """The model of a distributed checkpoint (torch_dist) of a GPTModel, of whatever layout it was saved in.

    Only the index and what describes the model are read; nothing of Megatron is imported or run.

    Args:
        folder: where Megatron-LM, Megatron-Bridge or NeMo saved, or one of its iterations.
        describe: a YAML file with our groups model, router and experts; None for what the checkpoint says itself.

    Raises: CheckpointError in one line for another format, a damaged or missing file, a feature that we do not have, or
        tensors that do not fit; ConfigError for a `describe` that cannot be read, or describes an impossible model.
    """
    weights = find_weights(Path(folder))
    index = read_index(weights)
    common = read_common(weights, index)
    own: Mapping[str, Any] = {}
    zero_centered = False
    if describe is not None:
        groups = described_groups(describe)
        plan = ModelPlan.from_config(groups)
        if plan.is_moe:
            demand_experts(NAME, plan, bias=...)
    else:
        if (weights / DESCRIPTION).is_file():
            own = read_description(weights)
            groups = own["config"]
        else:
            fields = find_fields(weights, common)
            groups, zero_centered = groups_of(fields), fields.flag("layernorm_zero_centered_gamma")
        plan = _plan(weights, groups)
    held = open_distributed(weights, index, FileSystemReader(weights))
    return StoredModel(
        source=Path(folder),
        format="megatron",
        config={group: groups[group] for group in GROUPS},
        tensors=_read_tensors(weights, plan, held, zero_centered),
        tokenizer=_tokenizer(weights, own),
        step=own["step"] if own else _step(common),
        carried={name: weights / name for name in own.get("carried") or () if (weights / name).is_file()},
        origin=own.get("origin") or {},
    )


def _plan(weights: Path, groups: Mapping[str, Any]) -> ModelPlan:
    try:
        return ModelPlan.from_config(groups)
    except ConfigError as error:
        raise CheckpointError(f"{weights} describes a model that cannot be built: {error}") from None


def _read_tensors(
    weights: Path, plan: ModelPlan, held: Mapping[str, LazyTensor], zero_centered: bool
) -> dict[str, LazyTensor]:
    plain = plain_view(weights, held, plan.config.layers)
    for key in (EMBEDDING, HEAD):  # rows that only fill the vocabulary up to a multiple
        if key in plain and plain[key].shape[0] > plan.config.vocab_size:
            plain[key] = narrow(plain[key], 0, 0, plan.config.vocab_size)
    shapes = wanted_shapes(plan)
    tensors: dict[str, LazyTensor] = {}
    used: set[str] = set()
    for rule in megatron_rules(plan, zero_centered):
        layout = rule.layouts[0]
        wanted = layout.write([LazyTensor(shapes[name], torch.float32, _unread) for name in rule.names])
        theirs = [_checked(weights, key, plain, blank) for key, blank in zip(layout.keys, wanted, strict=True)]
        used.update(layout.keys)
        tensors.update(zip(rule.names, layout.read(theirs), strict=True))
    if plan.config.tie_embeddings:
        used.add(HEAD)  # some write it all the same
    unknown = [key for key in plain if key not in used]
    if unknown:
        raise CheckpointError(
            f"{weights} holds {unknown[0]}, which its description does not ask for ({len(unknown)} such in all), "
            "allowed: the tensors of the model described"
        )
    return tensors


def _checked(weights: Path, key: str, plain: Mapping[str, LazyTensor], blank: LazyTensor) -> LazyTensor:
    tensor = plain.get(key)
    if tensor is None:
        raise CheckpointError(f"{weights} lacks {key}, allowed: a checkpoint with all tensors of the model described")
    if tensor.shape != blank.shape:
        raise CheckpointError(
            f"{weights}: {key} is {tuple(tensor.shape)}, allowed: {tuple(blank.shape)}, which its description asks for"
        )
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(f"{weights}: {key} is {tensor.dtype}, allowed: {', '.join(str(one) for one in _FLOATS)}")
    return tensor


def _tokenizer(weights: Path, own: Mapping[str, Any]) -> Tokenizer | None:
    spec = own.get("tokenizer")
    return None if spec is None else tokenizer_from(spec, weights)


def _step(common: Mapping[str, Any]) -> int:
    step = common.get("iteration")
    return step if isinstance(step, int) and not isinstance(step, bool) and step > 0 else 0


def _unread(_: Any) -> torch.Tensor:
    raise AssertionError("a rule must tell shapes without reading")
