"""Weights of a GPTModel under our names, both ways: one rank's parts, or whole tensors.

Attention, dense MLPs, norms, embedding and head go by the rules of `interop.megatron`, which hold for the slices of one
tp rank too: fused rows are whole groups of heads, and halves for gate and up. MoE layers are our own modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels import CheckpointError, ConfigError
from ...parallel.checkpoint.lazy import LazyTensor, in_memory
from ..build import ModelPlan
from ..interop.huggingface.tensor_rules import Layout, TensorRule, same
from ..interop.megatron.rules import megatron_rules
from ..models.frozen import is_frozen
from ..models.init import initialise_part
from .layer import Cut
from .model import ScatterfoldGPT

# Which dimension of our tensors tp cuts, by their names; the others are whole on every rank.
_TENSOR_PARALLEL = (
    (re.compile(r"(embedding|head)\.weight|.*\.attention\.(w[qkv]\.(weight|bias)|sinks)|.*\.(w_gate|w_up)\.weight"), 0),
    (re.compile(r".*\.(wo|w_out)\.weight"), 1),
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Part:
    """What this rank holds of one of our tensors.

    Attributes:
        values: in our shape; a copy.
        cuts: how the whole is spread; none for a tensor that every rank of the stage holds.
    """

    values: Tensor
    cuts: tuple[Cut, ...] = ()

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return _whole(self.values.shape, self.cuts)

    @property
    def index(self) -> tuple[slice, ...]:
        """Where in the whole it is."""
        return _index(self.values.shape, self.cuts)


@torch.no_grad()
def local_parts(model: ScatterfoldGPT, of: Callable[[Tensor], Tensor] | None = None) -> dict[str, Part]:
    """This rank's part of every parameter and persistent buffer of this stage, by our names. Communicates nothing.

    Args:
        of: what to take in the place of a parameter, of its shape: its main_grad, its float32 copy, Adam's moments.
            None for the parameter. Buffers, which have none of these, are left out where `of` is given.
    """
    return {
        name: Part(tensor.read(), _cuts(model, name))
        for entry in _entries(model, of)
        for name, tensor in entry.ours().items()
    }


@torch.no_grad()
def to_ours(model: ScatterfoldGPT, of: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The whole tensors of this stage by our names, on every rank of it. Every rank of the stage must call it.

    Args:
        of: as of `local_parts`.
    """
    return {name: gathered(part) for name, part in local_parts(model, of).items()}


def gathered(part: Part) -> Tensor:
    """The whole of one tensor. Every rank of the groups that cut it must call it."""
    values = part.values
    for cut in part.cuts[::-1]:
        ranks = dist.get_world_size(cut.group)
        if ranks > 1:
            found = [torch.empty_like(values) for _ in range(ranks)]
            dist.all_gather(found, values.contiguous(), group=cut.group)
            values = torch.cat(found, cut.dim)
    return values


@torch.no_grad()
def load_ours(
    model: ScatterfoldGPT,
    tensors: Mapping[str, Tensor | LazyTensor],
    of: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Copy this rank's part of whole tensors, by our names, into the model. Reads only the parts; communicates nothing.

    Args:
        tensors: those of other stages may be among them.
        of: as of `local_parts`; what it returns is written.

    Raises: CheckpointError, with nothing changed, for a tensor that is missing or of another shape.
    """
    entries = list(_entries(model, of))
    for entry in entries:
        for name, local in entry.ours().items():
            if name not in tensors:
                raise CheckpointError(f"{name} is missing, allowed: all tensors of the model")
            wanted = _whole(local.shape, _cuts(model, name))
            if tensors[name].shape != wanted:
                raise CheckpointError(f"{name} is {tuple(tensors[name].shape)}, allowed: {tuple(wanted)}")
    for entry in entries:
        held = {}
        for name, local in entry.ours().items():
            tensor, index = tensors[name], _index(local.shape, _cuts(model, name))
            held[name] = tensor.read(index) if isinstance(tensor, LazyTensor) else tensor[index]
        entry.store(held)


@torch.no_grad()
def reset_parameters(model: ScatterfoldGPT, seed: int) -> None:
    """Give parameters and buffers the initial values of our own model with this seed."""
    for entry in _entries(model, lambda parameter: parameter):
        held = {}
        for name, local in entry.ours().items():
            cuts = _cuts(model, name)
            held[name] = torch.empty(local.shape, dtype=torch.float32, device=entry.theirs[0].device)
            whole, index = _whole(local.shape, cuts), _index(local.shape, cuts)
            initialise_part(held[name], name, whole, index, model.plan.config, seed)
        entry.store(held)
    for _, layer in model.moe_layers():
        layer.router.reset_buffers()


def freeze(model: ScatterfoldGPT, patterns: tuple[str, ...]) -> None:
    """Let no gradient be computed for the parameters that `model.frozen` names.

    Raises: ConfigError where a pattern names a part of what Megatron keeps in one parameter.
    """
    for entry in _entries(model, lambda parameter: parameter):
        names = entry.names
        frozen = [is_frozen(name, patterns) for name in names]
        if any(frozen) and not all(frozen):
            raise ConfigError(
                f"model.frozen={list(patterns)} freezes {names[frozen.index(True)]} and not "
                f"{names[frozen.index(False)]}, which engine=megatron keeps in one parameter, allowed: both or none"
            )
        for parameter in entry.theirs:
            parameter.requires_grad_(not any(frozen))


@dataclass(frozen=True, eq=False)
class _Entry:
    """Tensors of Megatron's on this rank, and those of ours that hold the same values.

    Attributes:
        names: ours.
        theirs: live.
        layout: joins them.
    """

    names: tuple[str, ...]
    theirs: tuple[Tensor, ...]
    layout: Layout

    def ours(self) -> dict[str, LazyTensor]:
        """This rank's parts, in our shapes; nothing is read yet."""
        return dict(zip(self.names, self.layout.read([in_memory(tensor) for tensor in self.theirs]), strict=True))

    def store(self, values: Mapping[str, Tensor]) -> None:
        """Write this rank's parts."""
        written = self.layout.write([in_memory(values[name]) for name in self.names])
        for target, tensor in zip(self.theirs, written, strict=True):
            target.copy_(tensor.read())


def _entries(model: ScatterfoldGPT, of: Callable[[Tensor], Tensor] | None) -> Iterator[_Entry]:
    """Of everything in this stage; of parameters only where `of` is given."""
    tensors = {name: parameter if of is None else of(parameter) for name, parameter in model.named_parameters()}
    if of is None:
        for place, layer in enumerate(model.decoder.layers):
            tensors |= {f"decoder.layers.{place}.{name}": buffer for name, buffer in layer.named_buffers()}
    here = {number: place for place, number in enumerate(model.layers)}

    def key_here(key: str) -> str:
        """By the number of the layer in this stage, not in the model."""
        match = _LAYER.fullmatch(key)
        return key if match is None else f"decoder.layers.{here.get(int(match[1]))}.{match[2]}"

    for rule in _rules(model):
        keys = [key_here(key) for key in rule.layouts[0].keys]
        if keys and all(key in tensors for key in keys):
            yield _Entry(rule.names, tuple(tensors[key] for key in keys), rule.layouts[0])


def _rules(model: ScatterfoldGPT) -> list[TensorRule]:
    """Of the whole model, for the slices of one tp rank, but of the MoE layers only those that are here."""
    moe = tuple(f"blocks.{layer}.mlp." for layer in model.plan.moe_layers)
    rules = [rule for rule in megatron_rules(_of_one_rank(model)) if not rule.names[0].startswith(moe)]
    for number, layer in model.moe_layers():
        names = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
        rules += [same(f"blocks.{number}.mlp.{name}", f"decoder.layers.{number}.mlp.{name}") for name in names]
    return rules


def _of_one_rank(model: ScatterfoldGPT) -> ModelPlan:
    config, tp = model.plan.config, model.config.tensor_model_parallel_size
    heads = {"heads": config.heads // tp, "kv_heads": config.num_kv_heads // tp, "head_width": config.head_size}
    return replace(model.plan, config=replace(config, **heads))


def _cuts(model: ScatterfoldGPT, name: str) -> tuple[Cut, ...]:
    for number, layer in model.moe_layers():
        prefix = f"blocks.{number}.mlp."
        if name.startswith(prefix):
            return layer.cuts().get(name.removeprefix(prefix), ())
    for pattern, dim in _TENSOR_PARALLEL:
        if pattern.fullmatch(name):
            return (Cut(dim, model.pg_collection.tp),)
    return ()


def _whole(local: torch.Size, cuts: tuple[Cut, ...]) -> torch.Size:
    shape = list(local)
    for cut in cuts:
        shape[cut.dim] *= dist.get_world_size(cut.group)
    return torch.Size(shape)


def _index(local: torch.Size, cuts: tuple[Cut, ...]) -> tuple[slice, ...]:
    first = [0] * len(local)
    for cut in cuts:
        first[cut.dim] = dist.get_rank(cut.group) * local[cut.dim]
    return tuple(slice(start, start + size) for start, size in zip(first, local))
