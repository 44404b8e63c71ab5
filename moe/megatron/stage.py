"""A pipeline stage of a GPTModel as the engine trains it: called like a part of ours, with weights under our names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...parallel.checkpoint.lazy import LazyTensor
from ...parallel.context.zigzag import own_part
from ..context import ALONE, StepContext
from ..models.init import initialise_part
from .layer import MegatronMoELayer
from .model import ScatterfoldGPT
from .weights import Part, load_ours, local_parts


class GPTStage(nn.Module):
    """What `parallel.engines.megatron.MegatronPart` asks for, and the `moe_layers()` that a training loop asks for.

    Parameters have Megatron's names under `module.`; `local_parts` gives them ours.

    Args:
        module: the stage.
    """

    def __init__(self, module: ScatterfoldGPT) -> None:
        super().__init__()
        self.module = module
        if module.pre_process and any(not parameter.requires_grad for parameter in module.embedding.parameters()):
            module.embedding.register_forward_hook(_let_gradient_in)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: StepContext = ALONE,
    ) -> Tensor:
        """() float32 sum of the cross-entropy over labels of 0 or more; hidden of a stage but the last.

        Args: those of `Transformer.forward`, of whole sequences. `context` is what `begin_step` has told already.
        """
        groups = self.module.pg_collection
        cp, rank = groups.cp.size(), groups.cp.rank()
        own_tokens = own_part(tokens, 1, cp, rank)
        if labels is None or not self.module.post_process:
            return self.module(own_tokens, cu_seqlens=cu_seqlens)
        own_labels = own_part(labels, 1, cp, rank)
        counts = own_labels >= 0
        losses = self.module(own_tokens, labels=own_labels.clamp(min=0), cu_seqlens=cu_seqlens)
        return torch.where(counts, losses, 0.0).sum()

    def begin_step(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Hand the context of a step, which all its micro-batches share, to the MoE layers."""
        self.module.begin_step(micro_batches[0].get("context", ALONE))

    def moe_layers(self) -> list[tuple[int, MegatronMoELayer]]:
        """The MoE layers with their layer numbers."""
        return self.module.moe_layers()

    def local_parts(self, of: Callable[[Tensor], Tensor]) -> dict[str, Part]:
        return local_parts(self.module, of)

    def load_ours(self, tensors: Mapping[str, Tensor | LazyTensor], of: Callable[[Tensor], Tensor]) -> None:
        load_ours(self.module, tensors, of)

    def live_buffers(self) -> dict[str, Tensor]:
        """Of the routers."""
        layers = self.moe_layers()
        return {
            f"blocks.{number}.mlp.{name}": buffer for number, layer in layers for name, buffer in layer.named_buffers()
        }

    @torch.no_grad()
    def initial_values(self, seed: int) -> dict[str, LazyTensor]:
        """Of this stage's parameters, in float32; only this rank's part of each can be read."""
        found = {}
        for name, part in local_parts(self.module, lambda p: torch.zeros_like(p, dtype=torch.float32)).items():
            initialise_part(part.values, name, part.shape, part.index, self.module.plan.config, seed)
            found[name] = LazyTensor(part.shape, torch.float32, lambda index, part=part: part.values)
        return found


def _let_gradient_in(module: nn.Module, inputs: object, hidden: Tensor) -> None:
    """Megatron recomputes layers only for an input that has a gradient; a frozen embedding's would have none."""
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()
