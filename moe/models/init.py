"""Initial values: a function of the seed and a parameter's name, so the same for every layout and way of building.

- Matrices: normal with standard deviation 1 / sqrt(fan-in), cut off at three deviations, so that a unit-variance input
  gives a unit-variance output. `model.init_std` replaces 1 / sqrt(fan-in).
- Stacked expert matrices: each expert is drawn on its own, by the same rule for its own shape, so an expert starts as
  the dense MLP of its shape and does not depend on how many there are.
- Matrices that write to the residual stream: additionally divided by sqrt(2 * layers), for 2 * layers such writes of
  equal variance then add up to the variance of one (GPT-2, section 2.3).
- Embedding: standard deviation 1 / sqrt(D), tied to the head or not.
- Router: standard deviation 0.02, so that logits start small and loads near balance.
- Vectors: biases are zero, scales one. Buffers: a module's `reset_buffers()` if it has one.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import ModelConfig

_WRITES_TO_RESIDUAL = re.compile(r"\.(wo\.weight|w_out|w_out\.weight)$")


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter and buffer of a materialised model, sharded or not, in place.

    Numbers are drawn on the parameter's device, so they differ between CPU and CUDA.
    """
    for name, parameter in model.named_parameters():
        _fill(parameter, name, _std(name, parameter, config), seed)
    for module in model.modules():
        reset_buffers = getattr(module, "reset_buffers", None)
        if reset_buffers is not None:
            reset_buffers()


def _std(name: str, parameter: Tensor, config: ModelConfig) -> float:
    if name.endswith(".router.weight"):
        return 0.02
    std = parameter.shape[-1] ** -0.5 if config.init_std is None else config.init_std
    return std / (2 * config.layers) ** 0.5 if _WRITES_TO_RESIDUAL.search(name) else std


def _fill(parameter: Tensor, name: str, std: float, seed: int) -> None:
    if parameter.ndim < 2:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    elif isinstance(parameter, DTensor):
        whole = _draw(parameter.shape, parameter.dtype, parameter.to_local().device, name, std, seed)
        mesh, placements = parameter.device_mesh, parameter.placements
        parameter.to_local().copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local())
    else:
        parameter.copy_(_draw(parameter.shape, parameter.dtype, parameter.device, name, std, seed))


def _draw(shape: torch.Size, dtype: torch.dtype, device: torch.device, name: str, std: float, seed: int) -> Tensor:
    """The full parameter, of a shape that a normal distribution of that deviation fills."""
    if len(shape) == 2:
        return _normal(torch.empty(shape, dtype=dtype, device=device), std, f"{seed}/{name}")
    whole = torch.empty(shape, dtype=dtype, device=device)
    for expert, matrix in enumerate(whole):
        _normal(matrix, std, f"{seed}/{name}/{expert}")
    return whole


def _normal(matrix: Tensor, std: float, key: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator(matrix.device).manual_seed(seed)
    return matrix.normal_(0.0, std, generator=generator).clamp_(-3 * std, 3 * std)
