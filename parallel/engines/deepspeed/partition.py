"""ZeRO stage 3: a model that is cut while it is made, and whose blocks are gathered whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...plan import ShardingPlan


def make_partitioned(
    deepspeed: ModuleType,
    part: nn.Module,
    plan: ShardingPlan,
    config: Mapping[str, Any],
    device: torch.device,
    seed: int | None,
) -> None:
    """Give a model its values one block at a time, and cut each over the ranks before the next is made.

    So no rank ever holds the whole model. The values are those of `reset_parameters(seed)`, which fills what it finds:
    all that is not of the block is out of its sight meanwhile.

    Args:
        seed: None for a model that has values.
    """
    if seed is not None:
        for module in part.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty_like(buffer, device=device)
    chunks = [*plan.units, part]
    done: set[int] = set()
    for chunk in chunks:
        own = [(m, n) for m in chunk.modules() for n, _ in m.named_parameters(recurse=False) if id(m) not in done]
        if seed is not None:
            _materialise(own, device)
            with _only(part, {(id(module), name) for module, name in own}):
                part.reset_parameters(seed)  # type: ignore[operator]
        done |= {id(module) for module in chunk.modules()}
        deepspeed.zero.Init(module=chunk, config_dict_or_path=dict(config), dtype=torch.float32)


def _materialise(names: Iterable[tuple[nn.Module, str]], device: torch.device) -> None:
    """Give parameters memory; one that two modules share stays one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module, name in names:
        parameter = module._parameters[name]
        assert parameter is not None
        if parameter not in made:
            empty = torch.empty_like(parameter, device=device, requires_grad=False)
            made[parameter] = nn.Parameter(empty, parameter.requires_grad)
        module._parameters[name] = made[parameter]


@contextlib.contextmanager
def _only(part: nn.Module, names: set[tuple[int, str]]) -> Iterator[None]:
    """A model that shows only some of its parameters."""
    hidden = [
        (module, name, parameter)
        for module in part.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (id(module), name) not in names
    ]
    for module, name, _ in hidden:
        module._parameters[name] = None
    try:
        yield
    finally:
        for module, name, parameter in hidden:
            module._parameters[name] = parameter


@contextlib.contextmanager
def in_whole_shapes(part: nn.Module) -> Iterator[None]:
    """Give cut parameters the shape of the whole, without values or memory: what decays is told by shapes."""
    cut = [parameter for parameter in part.parameters() if hasattr(parameter, "ds_shape")]
    kept = [parameter.data for parameter in cut]
    for parameter in cut:
        parameter.data = parameter.data.new_zeros(1).expand(parameter.ds_shape)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter, data in zip(cut, kept):
            parameter.data = data


def gather_whole_blocks(deepspeed: ModuleType, plan: ShardingPlan) -> None:
    """Let ZeRO gather and free a block at a time, as FSDP does here, and not each module in it.

    It finds out when a module's backward pass begins and ends by the tensors that go in and come out, and our routers
    return no tensor but a value that holds some: their weights would be gone when the backward pass needs them. Of a
    block, a tensor goes in and one comes out.
    """
    for unit in plan.units:
        deepspeed.utils.set_z3_leaf_module(unit, True)
        if any(parameter.requires_grad for parameter in unit.parameters()):
            unit.register_forward_pre_hook(_let_gradient_in)


def _let_gradient_in(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Make the input of the first block that learns need a gradient, although what made it is frozen.

    ZeRO takes the gradients of a block when that of its input is there; if there is none to come, it takes them before
    they are computed, and finds zeros.
    """
    first = inputs[0]
    if not torch.is_grad_enabled() or not isinstance(first, Tensor) or first.requires_grad:
        return None
    return (first.detach().requires_grad_(), *inputs[1:])
