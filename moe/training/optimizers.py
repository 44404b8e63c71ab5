"""Optimizers: a configuration that, called with a model, makes a torch optimizer with parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from ...kernels import ConfigError


class AdamW:
    """AdamW (1711.05101), without weight decay on norms and biases.

    Args:
        lr: peak learning rate.
        betas, eps, weight_decay: as in torch.
        decay_embeddings: whether token embeddings (and a head tied to them) decay.
        fused: one kernel for all parameters where torch has it; None to use it wherever it exists.

    Raises: ConfigError for a value out of range.
    """

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay_embeddings: bool = True,
        fused: bool | None = None,
    ) -> None:
        if not lr > 0:
            raise ConfigError(f"optimizer.lr={lr} is out of range, allowed: above 0")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"optimizer.betas={list(betas)} is out of range, allowed: two numbers in [0, 1)")
        if weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay={weight_decay} is negative, allowed: 0 or more")
        if not eps > 0:
            raise ConfigError(f"optimizer.eps={eps} is out of range, allowed: above 0")
        self.lr = lr
        self.betas = (float(betas[0]), float(betas[1]))
        self.eps = eps
        self.weight_decay = weight_decay
        self.decay_embeddings = decay_embeddings
        self.fused = fused

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer of the model's trainable parameters."""
        decayed, plain = self._split(model)
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]] or groups[:1],  # a pipeline stage may be frozen as a whole
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=self.fused is not False,
        )

    def _split(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            last = name.rpartition(".")[2]
            is_bias = parameter.ndim < 2 or last.endswith("bias") or last in ("b_in", "b_out")  # experts': (E, F)
            spared = is_bias or (id(parameter) in embeddings and not self.decay_embeddings)
            (plain if spared else decayed).append(parameter)
        return decayed, plain


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
