"""DeepSpeed's own checkpoints of experts that are spread over ranks: a file for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .experts import Cut

# How DeepSpeed calls the parameters of one expert of `deepspeed.moe.layer.MoE`, after the name of that module.
_EXPERT = "deepspeed_moe.experts.deepspeed_experts."


@contextlib.contextmanager
def experts_as_its_own(part: nn.Module, cuts: Mapping[str, Cut], ep: int) -> Iterator[None]:
    """Let DeepSpeed take our experts for its own while it writes or reads a checkpoint.

    It writes and reads experts of modules of its class `MoE` only, and expects a tensor for each expert. So within,
    modules that hold experts are of that class too, and their state has our stacked tensors expert by expert. The
    expert with the number e of the MoE layer i is then in the file `layer_i_expert_e_mp_rank_00_model_states.pt`.

    Args:
        cuts: the experts' parameters by name, as `localise` returns them.
        ep: ranks over which they are spread.
    """
    from deepspeed.moe.layer import MoE

    as_its_own: Any = MoE  # a base of classes that are made here
    kept, hooks = [], []
    for name in sorted({parameter.rpartition(".")[0] for parameter in cuts}):
        module = part.get_submodule(name)
        own = [n for n, _ in module.named_parameters(recurse=False) if f"{name}.{n}" in cuts]
        seen = {"expert_group_name": f"ep_size_{ep}", "num_local_experts": module.get_parameter(own[0]).shape[0]}
        kept.append((module, module.__class__))
        module.__class__ = type(module.__class__.__name__, (module.__class__, as_its_own), seen)
        hooks.append(module.register_state_dict_post_hook(_splitting(own)))
        hooks.append(module.register_load_state_dict_pre_hook(_stacking(own)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, its_class in kept:
            module.__class__ = its_class


def _splitting(names: Iterable[str]) -> Any:
    """A hook that gives each expert a tensor of its own."""

    def split(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for name in names:
            for number, tensor in enumerate(state.pop(f"{prefix}{name}")):
                state[f"{prefix}{_EXPERT}{number}.{name}"] = tensor

    return split


def _stacking(names: Iterable[str]) -> Any:
    """A hook that undoes it."""

    def stack(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        experts = range(module.num_local_experts)  # type: ignore[arg-type]
        for name in names:
            state[f"{prefix}{name}"] = torch.stack([state.pop(f"{prefix}{_EXPERT}{e}.{name}") for e in experts])

    return stack
