"""The state of a model and its optimizer as one flat mapping of tensors, which a checkpoint holds.

`model.<parameter or buffer>` and `optimizer.<parameter>.<what>`: names come from the bare module, and the tensors stand
for whole logical ones, so a checkpoint says nothing about the layout that wrote it. Hyper-parameters of the optimizer
are not state: they come from the config, and the learning rate from the schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

MODEL = "model."
OPTIMIZER = "optimizer."


def model_state(*parts: nn.Module) -> dict[str, Tensor]:
    """Live parameters and persistent buffers by name; a tensor that has two names appears under the first.

    Args:
        parts: of one model, with names that are unique among them.
    """
    state: dict[str, Tensor] = {}
    for part in parts:
        state.update({f"{MODEL}{name}": parameter.data for name, parameter in part.named_parameters()})
        for prefix, child in part.named_modules():
            for name, buffer in child.named_buffers(recurse=False):
                if name not in child._non_persistent_buffers_set:
                    state[f"{MODEL}{prefix}.{name}" if prefix else f"{MODEL}{name}"] = buffer
    return state


def optimizer_state(optimizer: torch.optim.Optimizer, *parts: nn.Module) -> dict[str, Tensor]:
    """What the optimizer remembers of each parameter, by the parameter's name; numbers become tensors."""
    state: dict[str, Tensor] = {}
    for name, parameter in _parameters(parts):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"{OPTIMIZER}{name}.{key}"] = value
            elif isinstance(value, (int, float)):
                state[f"{OPTIMIZER}{name}.{key}"] = torch.tensor(value, dtype=torch.float64)
    return state


def restore_numbers(optimizer: torch.optim.Optimizer, state: dict[str, Tensor], *parts: nn.Module) -> None:
    """Give the optimizer the plain numbers of a state that was loaded; tensors were loaded in place."""
    for name, parameter in _parameters(parts):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, (int, float)) and f"{OPTIMIZER}{name}.{key}" in state:
                optimizer.state[parameter][key] = type(value)(state[f"{OPTIMIZER}{name}.{key}"].item())


def _parameters(parts: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for part in parts:
        yield from part.named_parameters()


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer allocate its state, by a step with zero gradients and zero learning rate."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
