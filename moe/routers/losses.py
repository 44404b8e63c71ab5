"""Auxiliary losses of a router: balance of the load, and the size of the logits.

Every balance loss is alpha * E * sum_e f_e P_e, where f is the share of assignments of each expert (it sums to one,
and carries no gradient) and P the mean probability. It is alpha for a balanced load, whatever E and K, and
alpha * E / K if all tokens share the same K experts. The losses differ in where f and P are measured.

Each loss is a mean over the tokens of one pass; `moe.inject` weighs it by the pass's share of the step's tokens. Where
ranks hold parts of the same sequences, f counts the tokens of all of them and P those of this rank: the losses are
linear in P and f has no gradient, so the ranks' losses, weighed by their tokens, add up to the loss of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels import ConfigError


@dataclass(frozen=True)
class Decision:
    """What the losses see of one pass over T tokens in B sequences.

    Attributes:
        logits: (T, E).
        probs: (T, E), non-negative, each row sums to one.
        counts: (B, E), assignments per sequence, before dropping and without expert bias; of whole sequences, also
            where the T tokens are parts of them.
    """

    logits: Tensor
    probs: Tensor
    counts: Tensor


class RouterLoss(nn.Module):
    """One auxiliary loss, with its coefficient; a module because it may hold state.

    Attributes:
        reads_counts: whether it looks at `Decision.counts`, which then have to be those of whole sequences.
    """

    reads_counts = False

    def __init__(self, field: str, coefficient: float) -> None:
        super().__init__()
        if not coefficient >= 0:
            raise ConfigError(f"router.{field}={coefficient} is out of range, allowed: 0 or more")
        self.coefficient = coefficient

    def forward(self, decision: Decision) -> Tensor:
        """() loss, coefficient included; zero for no tokens."""
        raise NotImplementedError

    def reset_buffers(self) -> None:
        """Bring state, if there is any, to its start; needed after `to_empty`."""

    def finish_step(self, counts: Tensor) -> None:
        """Called once per optimizer step with the assignments (E,) of all ranks and micro-batches, before dropping."""

    def extra_repr(self) -> str:
        return f"{self.coefficient}"


class MicroBatchBalance(RouterLoss):
    """f and P over the tokens of one pass (Switch, 2101.03961, section 2.2, with f divided by K)."""

    reads_counts = True

    def forward(self, decision: Decision) -> Tensor:
        share_E = _shares(decision.counts.sum(0))
        mean_E = decision.probs.sum(0) / max(decision.probs.shape[0], 1)
        return self.coefficient * share_E.numel() * (share_E * mean_E).sum()


class SequenceBalance(RouterLoss):
    """f and P over each sequence, then the mean over sequences (DeepSeek-V3, 2412.19437, section 2.1.2).

    The same for any split of a batch into micro-batches of whole sequences.
    """

    reads_counts = True

    def forward(self, decision: Decision) -> Tensor:
        share_BE = _shares(decision.counts)
        num_sequences, num_experts = share_BE.shape
        probs_BSE = decision.probs.unflatten(0, (num_sequences, -1))
        mean_BE = probs_BSE.sum(1) / max(probs_BSE.shape[1], 1)
        return self.coefficient * num_experts * (share_BE * mean_BE).sum() / max(num_sequences, 1)


class GlobalBatchBalance(RouterLoss):
    """f over the whole global batch, P over the tokens of this pass (Qwen, 2501.11873).

    Experts may specialise within a sequence or micro-batch, as long as the global batch is balanced. The counts of a
    global batch are known only when its last micro-batch has been routed. So f is that of the optimizer step before,
    summed over all ranks and micro-batches: the gradient is then the same for any split of a batch, and nothing is
    exchanged inside the step. The first step has a uniform f, hence no balance gradient.
    """

    load: Tensor

    def __init__(self, field: str, coefficient: float, num_experts: int) -> None:
        super().__init__(field, coefficient)
        self.register_buffer("load", torch.full((num_experts,), 1.0 / num_experts))

    def reset_buffers(self) -> None:
        self.load.fill_(1.0 / self.load.numel())

    def forward(self, decision: Decision) -> Tensor:
        mean_E = decision.probs.sum(0) / max(decision.probs.shape[0], 1)
        return self.coefficient * self.load.numel() * (self.load * mean_E).sum()

    @torch.no_grad()
    def finish_step(self, counts: Tensor) -> None:
        self.load.copy_(_shares(counts.double()))


class ZLoss(RouterLoss):
    """Mean over tokens of the squared log-sum-exp of the logits; keeps them small (ST-MoE, 2202.08906, section 3.3)."""

    def forward(self, decision: Decision) -> Tensor:
        squares_T = decision.logits.logsumexp(-1).square()
        return self.coefficient * squares_T.sum() / max(squares_T.numel(), 1)


def _shares(counts: Tensor) -> Tensor:
    """Counts divided by their sum over the experts; zeros where there is nothing."""
    if not counts.is_floating_point():
        counts = counts.float()
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)
