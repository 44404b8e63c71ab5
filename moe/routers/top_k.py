"""The top-k router and its family: Switch, Mixtral, Qwen, DeepSeek."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import ConfigError
from .base import Choice, Router
from .scores import SCORES
from .selection import GROUP_SCORES, mask_groups, top_experts


class TopKRouter(Router):
    """Route each token to its K best experts.

    Ties go to the lowest expert id. With `bias_rate`, every expert has a bias that is added to its score for the
    choice only; after each optimizer step it moves by `bias_rate` up if the expert had less than the mean load of the
    step, down if it had more (loss-free balancing, 2408.15664). A rate of 0 keeps the bias as it is.

    Args:
        width: D.
        num_experts: E.
        top_k: K.
        eval_top_k: K in evaluation mode; None for the same.
        score: softmax (of all experts, then choose), sigmoid, or softmax_after (choose, then softmax of the chosen).
        renormalise: let the weights of a token sum to `scale`; None for: if K > 1. With K = 1 every weight is then
            `scale`, and only auxiliary losses train the router.
        scale: factor of all weights (DeepSeek's routed scaling factor).
        num_groups, top_groups: choose only among the `top_groups` best of `num_groups` groups of neighbouring experts.
        group_score: max (DeepSeek-V2) or top2_sum (DeepSeek-V3).
        bias_rate: step of the expert bias; None for no bias.
        others: see `Router`.

    Parameters and buffers: as `Router`, and `expert_bias` (E,) float32 if bias_rate is given.
    Shapes: hidden (T, D) -> RouterOutput with T * K wanted assignments.
    Raises: ConfigError for values that are impossible or do not fit together.
    """

    expert_bias: Tensor | None

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        eval_top_k: int | None = None,
        score: str = "softmax",
        renormalise: bool | None = None,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        group_score: str = "max",
        bias_rate: float | None = None,
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
        if score not in SCORES:
            raise ConfigError(f"router.score={score!r} is unknown, allowed: {', '.join(SCORES)}")
        _check_groups(num_experts, num_groups, top_groups, group_score)
        for name, value in (("top_k", top_k), ("eval_top_k", eval_top_k)):
            if value is not None:
                _check_top_k(name, value, num_experts, num_groups, top_groups)
        if bias_rate is not None and not bias_rate >= 0:
            raise ConfigError(f"router.bias_rate={bias_rate} is out of range, allowed: null, 0 or more")
        if not scale > 0:
            raise ConfigError(f"router.scale={scale} is out of range, allowed: above 0")
        super().__init__(
            width,
            num_experts,
            SCORES[score],
            experts_per_token=top_k,
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
        self.top_k, self.eval_top_k = top_k, top_k if eval_top_k is None else eval_top_k
        self.renormalise = top_k > 1 if renormalise is None else renormalise
        self.scale, self.bias_rate = scale, bias_rate
        self.num_groups, self.top_groups, self.group_score = num_groups, top_groups, group_score
        if top_k == 1 and (self.renormalise or score == "softmax_after") and not self.losses:
            raise ConfigError(
                f"router.top_k=1 with router.renormalise={str(self.renormalise).lower()} and router.score={score!r} "
                "gives every weight the same value, so nothing trains the router, allowed: renormalise=false with "
                "score=softmax or sigmoid, or an auxiliary loss"
            )
        self.register_buffer("expert_bias", None if bias_rate is None else torch.zeros(num_experts))
        self.reset_parameters()

    @property
    def max_experts_per_token(self) -> int:
        return self.top_k if self.training else self.eval_top_k

    def choose(self, scores_TE: Tensor) -> Choice:
        if self.expert_bias is not None:
            scores_TE = scores_TE + self.expert_bias
        return self._choose_plainly(scores_TE)

    def choose_for_losses(self, scores_TE: Tensor, choice: Choice) -> Choice:
        """Without the bias (DeepSeek-V3, equation 18), so that the two ways of balancing do not fight."""
        if self.expert_bias is None or not self.losses:
            return choice
        return self._choose_plainly(scores_TE)

    def weigh(self, chosen_TK: Tensor, choice: Choice) -> Tensor:
        weights_TK = self.score.weigh(chosen_TK)
        if self.renormalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return weights_TK if self.scale == 1.0 else weights_TK * self.scale

    def reset_buffers(self) -> None:
        super().reset_buffers()
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    @torch.no_grad()
    def finish_step(self, counts: Tensor) -> None:
        super().finish_step(counts)
        if self.expert_bias is not None and self.bias_rate:
            counts = counts.to(torch.float64)
            self.expert_bias.add_((counts.mean() - counts).sign(), alpha=self.bias_rate)

    def _choose_plainly(self, scores_TE: Tensor) -> Choice:
        if self.num_groups > 1:
            scores_TE = mask_groups(scores_TE, self.num_groups, self.top_groups, self.group_score)
        return Choice(top_experts(scores_TE, self.max_experts_per_token))


def _check_top_k(name: str, top_k: int, num_experts: int, num_groups: int, top_groups: int) -> None:
    if top_k < 1:
        raise ConfigError(f"router.{name}={top_k} is too small, allowed: 1 to model.num_experts={num_experts}")
    if top_k > num_experts:
        raise ConfigError(f"router.{name}={top_k} is larger than model.num_experts={num_experts}")
    reachable = top_groups * (num_experts // num_groups)
    if top_k > reachable:
        raise ConfigError(
            f"router.{name}={top_k} is larger than the {reachable} experts of router.top_groups={top_groups} of "
            f"router.num_groups={num_groups} groups"
        )


def _check_groups(num_experts: int, num_groups: int, top_groups: int, group_score: str) -> None:
    if num_groups < 1 or num_experts % num_groups:
        raise ConfigError(f"router.num_groups={num_groups} does not divide model.num_experts={num_experts}")
    if not 1 <= top_groups <= num_groups:
        raise ConfigError(f"router.top_groups={top_groups} is out of range, allowed: 1 to num_groups={num_groups}")
    if group_score not in GROUP_SCORES:
        raise ConfigError(f"router.group_score={group_score!r} is unknown, allowed: {', '.join(GROUP_SCORES)}")
    if group_score == "top2_sum" and num_groups > 1 and num_experts // num_groups < 2:
        raise ConfigError(
            f"router.group_score='top2_sum' needs two experts per group, router.num_groups={num_groups} leaves "
            f"{num_experts // num_groups} of model.num_experts={num_experts}"
        )
