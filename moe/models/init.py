"""Initial values: a function of the seed and a parameter's name, so the same for every layout and way of building.

- Matrices: normal with standard deviation 1 / sqrt(fan-in), cut off at three deviations, so that a unit-variance input
  gives a unit-variance output. `model.init_std` replaces 1 / sqrt(fan-in).
- Stacked expert matrices: each expert is drawn on its own, by the same rule for its own shape, so an expert starts as
  the dense MLP of its shape and does not depend on how many there are.
- Matrices that write to the residual stream: additionally divided by sqrt(2 * layers), for 2 * layers such writes of
  equal variance then add up to the variance of one (GPT-2, section 2.3).
- Embedding: standard deviation 1 / sqrt(D), tied to the head or not.
- Router: standard deviation 0.02, so that logits start small and loads near balance.
- Adapters: the second matrix is zero, so that they change nothing at the start (2401.02731, section 3.2).
- Vectors: biases and attention sinks are zero, scales one. Buffers: a module's `reset_buffers()` if it has one.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn

from ...parallel.shards import local_part, local_range
from .config import ModelConfig

_WRITES_TO_RESIDUAL = re.compile(r"\.(wo\.weight|w_out|w_out\.weight)$")


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter and buffer of a materialised model, sharded or not, in place.

    Numbers are drawn on the parameter's device, so they differ between CPU and CUDA.
    """
    for name, parameter in model.named_parameters():
        held = tuple(
            slice(part.start, part.stop) for part in (local_range(parameter, d) for d in range(parameter.ndim))
        )
        initialise_part(local_part(parameter), name, parameter.shape, held, config, seed)
    for module in model.modules():
        reset_buffers = getattr(module, "reset_buffers", None)
        if reset_buffers is not None:
            reset_buffers()


@torch.no_grad()
def initialise_part(
    local: Tensor, name: str, whole: torch.Size, held: tuple[slice, ...], config: ModelConfig, seed: int
) -> None:
    """Give the part of a parameter the values that the whole has there; experts held by others are not drawn.

    Args:
        local: the part.
        name: of the parameter in the model.
        whole: its shape.
        held: where the part is, one slice a dimension.
    """
    std = _std(name, whole, config)
    if name.endswith(".adapters.w_out"):
        local.zero_()
        return
    is_bias = name.endswith(("bias", ".b_in", ".b_out", ".sinks"))
    if is_bias or local.ndim < 2:
        local.fill_(0.0 if is_bias else 1.0)
        return
    if local.ndim == 2:
        local.copy_(_normal(whole, local, std, f"{seed}/{name}")[held])
        return
    for row, expert in enumerate(range(held[0].start, held[0].stop)):
        local[row].copy_(_normal(whole[1:], local, std, f"{seed}/{name}/{expert}")[held[1:]])


def _std(name: str, shape: torch.Size, config: ModelConfig) -> float:
    if name.endswith(".router.weight"):
        return 0.02
    std = shape[-1] ** -0.5 if config.init_std is None else config.init_std
    return std / (2 * config.layers) ** 0.5 if _WRITES_TO_RESIDUAL.search(name) else std


def _normal(shape: torch.Size, like: Tensor, std: float, key: str) -> Tensor:
    """A matrix of the type and on the device of another, drawn from a key."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator(like.device).manual_seed(seed)
    return like.new_empty(shape).normal_(0.0, std, generator=generator).clamp_(-3 * std, 3 * std)
