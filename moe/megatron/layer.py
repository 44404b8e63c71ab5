"""Scatterfold's MoE layer as the `mlp` of Megatron-Core's TransformerLayer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ...kernels import ConfigError, Routing
from ...parallel.torch_private import in_backward
from ..blocks import MLP, GatedMLP
from ..build import ModelPlan
from ..components import build
from ..context import ALONE, StepContext
from ..experts import Experts
from ..layer import MoELayer
from ..routers.output import RouterOutput
from ..sharding import EXPERT_WIDTH_DIMENSIONS
from .groups import groups_of_megatron, meshes_of
from .parts import cut, device_of


@dataclass(frozen=True)
class Cut:
    """A dimension of a tensor that is spread over a group, of which rank r has the r-th of equal parts."""

    dim: int
    group: dist.ProcessGroup


class MegatronMoELayer(MoELayer):
    """Our router, dispatcher, kernels and shared expert, over Megatron's groups.

    A TransformerLayer builds it from `ModuleSpec(module=MegatronMoELayer, params={"plan": …, "layer": …})`. Parameters
    are plain tensors, this rank's parts: E / EP experts, of each the slice F / ETP, and F / TP of the shared expert.

    - Experts are marked `allreduce=False`, whatever EP is, so that DDP sums their gradients over expert data parallel
      ranks and the distributed optimizer keeps them apart; and as cut, so that the gradient norm counts each part.
    - What every tp rank has whole sees other tokens on each (sequence parallelism) and is marked `sequence_parallel`:
      finalize_model_grads sums it over tp.
    - The router's weights stay in float32 when the model is cast.
    - `context`, set by `ScatterfoldGPT.begin_step`, holds what all micro-batches of a step have in common, not state of
      one of them: several may be in flight.

    Args:
        config: of Megatron, for sizes of groups, dtype and device.
        plan: our model.
        layer: number of this layer in it, counting from 0.
        pg_collection: None for the groups of `parallel_state`.

    Shapes: hidden (S / (CP * TP), B, D) -> the same, and None for the bias that is added later: there is none.
    Raises: ConfigError for experts that the groups cannot share, adapters, or tp without sequence parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: None = None,
        *,
        plan: ModelPlan,
        layer: int,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        groups = groups_of_megatron() if pg_collection is None else pg_collection
        meshes = meshes_of(groups)
        tp, etp = meshes.layout.tp, meshes.layout.etp
        if tp > 1 and not config.sequence_parallel:
            raise ConfigError(f"sequence_parallel=false with layout.tp={tp}, allowed: true, which MoE layers need")
        with torch.device("meta"):
            whole = plan.make_experts()
        check_experts(whole, etp)
        with torch.device(device_of(config)):
            super().__init__(plan.make_router(), whole, None, plan.make_dispatcher(meshes), index=layer)
            held = self.dispatcher.local_experts(whole.num_experts)
            sizes = {"num_experts": len(held), "expert_width": whole.expert_width // etp}
            self.experts = build(plan.experts, "experts", width=plan.config.width, **sizes)
            if plan.config.shared_expert_width is not None:
                kind = GatedMLP if plan.config.shared_expert_gate else MLP
                width, group = plan.config.shared_expert_width // tp, groups.tp if tp > 1 else None
                self.shared = kind(plan.config.width, width, plan.config.activation, group)
        self.config, self.groups, self.meshes = config, groups, meshes
        self.context = ALONE
        self._mark()
        if config.params_dtype != torch.float32:
            self.to(config.params_dtype)

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's, counting from 1 over the whole model."""
        if layer_number != self.index + 1:
            raise ConfigError(f"layer {layer_number} was built as layer {self.index + 1}, counting from 1")

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        if padding_mask is not None:
            raise NotImplementedError("padding_mask: sequences are packed, and labels say what counts")
        context = replace(
            self.context,
            num_sequences=hidden_states.shape[1],
            sequence_group=self.meshes.sequence_group,
            cp=self.meshes.layout.cp,
            statistics=None if in_backward() else self.context.statistics,  # recomputed tokens were counted
        )
        # Megatron has the sequence first, and what looks at sequences (capacity, balance) wants each in one piece.
        out = super().forward(hidden_states.transpose(0, 1), context)
        return out.transpose(0, 1).contiguous(), None

    def cuts(self) -> dict[str, tuple[Cut, ...]]:
        """How each parameter is spread, by its name in this layer; what is not named is whole on every rank."""
        found: dict[str, tuple[Cut, ...]] = {}
        for name, parameter in self.experts.named_parameters():
            cuts = (Cut(0, self.groups.ep),)
            if name in EXPERT_WIDTH_DIMENSIONS:
                cuts += (Cut(EXPERT_WIDTH_DIMENSIONS[name] % parameter.ndim, self.groups.expt_tp),)
            found[f"experts.{name}"] = cuts
        if self.shared is not None:
            for name, dim in SHARED_CUTS.items():
                if name != "w_gate.weight" or self.shared.w_gate is not None:
                    found[f"shared.{name}"] = (Cut(dim, self.groups.tp),)
        return found

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The layer for dist_checkpointing, under the keys and in the shapes of Megatron's own MoE layer."""
        from .checkpoint import sharded_moe

        return sharded_moe(self, prefix, tuple(sharded_offsets))

    def _inject_losses(self, routed: RouterOutput, num_tokens: int, context: StepContext) -> Routing:
        """By the share of the step's tokens where that is known, else as Megatron scales losses.

        Its schedules set a factor c on every auxiliary loss, and each tp, cp and dp rank adds its own; DDP and tp sum
        the gradients. With losses per token, c = 1 and finalize_model_grads divides by all tokens, so a mean over T
        tokens counts T times. Else c = CP / micro-batches and DDP divides by DP * CP; what is left to divide by is
        TP * CP, since each of those ranks has a mean over its part of the same sequences.
        """
        if context.global_tokens is not None:
            return super()._inject_losses(routed, num_tokens, context)
        layout = self.meshes.layout
        factor = num_tokens if self.config.calculate_per_token_loss else 1 / (layout.tp * layout.cp)
        weight = routed.routing.weight
        for loss in routed.losses.values():
            weight = MoEAuxLossAutoScaler.apply(weight, loss * factor)
        return routed.routing.with_weight(weight)

    def _mark(self) -> None:
        cuts = self.cuts()
        for name, parameter in self.named_parameters():
            if name in cuts:
                cut(parameter, cuts[name][-1].dim)
            else:
                parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
            if name.startswith("experts."):
                parameter.allreduce = False  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MegatronMoELayer:
        """Move the router, but never cast it."""
        before = {name: parameter.data for name, parameter in self.router.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.router.named_parameters():
            if parameter.dtype != before[name].dtype:
                parameter.data = before[name].to(parameter.device)
        return self


# Of the shared expert, the dimension of each matrix that runs over F.
SHARED_CUTS = {"w_gate.weight": 0, "w_up.weight": 0, "w_out.weight": 1}


def check_experts(experts: nn.Module, etp: int) -> None:
    """Raises: ConfigError for experts that Megatron's groups cannot hold."""
    if not isinstance(experts, Experts):
        raise ConfigError("experts: adapters on a shared MLP do not run in engine=megatron, allowed: engine=torch")
    if experts.b_out is not None and etp > 1:
        raise ConfigError(f"experts.bias=true with layout.etp={etp} in engine=megatron, allowed: layout.etp=1")
