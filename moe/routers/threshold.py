"""The threshold router of XMoE: as many experts as a token needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels import ConfigError
from .base import Choice, Router
from .scores import SCORES
from .selection import top_experts

_ONE = 2**40  # probability 1 as a whole number
_TIE = 1 - 2**-20  # probabilities whose ratio is above this are equal: rounding of logits makes them differ so much


class ThresholdRouter(Router):
    """Route each token to the fewest experts whose probabilities sum to `threshold` (XMoE, 2403.18926, section 3.2).

    Easy tokens take one expert and hard ones several, so compute follows difficulty. The best expert is always taken.
    Of equal experts a token takes all or none, up to `max_experts`: those that upcycling cuts from one MLP begin equal,
    and only together they are what they were cut from. Weights are the probabilities. Balance losses count all
    assignments, which are the load (XMoE counts first choices).
    Nothing is read back by the host: what a token does not take is padding of the routing.

    Args:
        width: D.
        num_experts: E.
        threshold: probability mass to reach, in (0, 1].
        max_experts: upper bound per token; None for no bound.
        renormalise: let the weights of a token sum to `scale` instead of the mass reached times `scale`.
        scale: factor of all weights.
        capacity_factor: over T / E, without a factor for the experts per token, as in XMoE.
        others: see `Router`.

    Shapes: hidden (T, D) -> RouterOutput with T to T * max_experts wanted assignments.
    Raises: ConfigError for values that are impossible.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        threshold: float,
        max_experts: int | None = None,
        *,
        renormalise: bool = False,
        scale: float = 1.0,
        gate_bias: bool = False,
        jitter: float = 0.0,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 4,
        drop: str = "position",
        balance_micro_batch: float = 0.0,
        balance_sequence: float = 0.0,
        balance_global_batch: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"router.threshold={threshold} is out of range, allowed: above 0, at most 1")
        if max_experts is not None and not 1 <= max_experts <= num_experts:
            raise ConfigError(
                f"router.max_experts={max_experts} is out of range, allowed: null, 1 to model.num_experts={num_experts}"
            )
        if not scale > 0:
            raise ConfigError(f"router.scale={scale} is out of range, allowed: above 0")
        super().__init__(
            width,
            num_experts,
            SCORES["softmax"],
            experts_per_token=1.0,
            gate_bias=gate_bias,
            jitter=jitter,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            min_capacity=min_capacity,
            drop=drop,
            balance_micro_batch=balance_micro_batch,
            balance_sequence=balance_sequence,
            balance_global_batch=balance_global_batch,
            z_loss=z_loss,
        )
        self.threshold, self.max_experts = threshold, max_experts or num_experts
        self.renormalise, self.scale = renormalise, scale
        if self.max_experts == 1 and renormalise and not self.losses:
            raise ConfigError(
                "router.renormalise=true with router.max_experts=1 gives every weight the same value, so nothing "
                "trains the router, allowed: renormalise=false, or an auxiliary loss"
            )
        self.reset_parameters()

    @property
    def max_experts_per_token(self) -> int:
        return self.max_experts

    def choose(self, scores_TE: Tensor) -> Choice:
        experts_TK = top_experts(scores_TE, self.max_experts)
        # Whole numbers: sums are exact, and deterministic on every device, which those of floats are not on CUDA.
        scores_TK = scores_TE.gather(1, experts_TK)
        ranked_TK = (scores_TK.double().nan_to_num(nan=1.0) * _ONE).long()
        mass_before_TK = ranked_TK.cumsum(-1) - ranked_TK
        ties_TK = nn.functional.pad(scores_TK[:, 1:] >= scores_TK[:, :-1] * _TIE, (1, 0), value=False)
        reached_TK = mass_before_TK.masked_fill(ties_TK, 0).cummax(-1).values  # mass of all strictly better experts
        return Choice(experts_TK, wanted=reached_TK < self.threshold * _ONE)

    def weigh(self, chosen_TK: Tensor, choice: Choice) -> Tensor:
        if self.renormalise and choice.wanted is not None:
            mass_T1 = torch.where(choice.wanted, chosen_TK, 0.0).sum(-1, keepdim=True)
            chosen_TK = chosen_TK / (mass_T1 + 1e-20)
        return chosen_TK if self.scale == 1.0 else chosen_TK * self.scale
