"""From logits to scores: what experts are ranked by, and what their weights are made of."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Score(Protocol):
    """How logits become scores, a distribution for the balance losses, and combine weights."""

    def rank(self, logits_TE: Tensor) -> Tensor:
        """Scores (T, E) by which experts are chosen."""
        ...

    def distribution(self, scores_TE: Tensor) -> Tensor:
        """Probabilities (T, E): non-negative, rows sum to one."""
        ...

    def weigh(self, chosen_TK: Tensor) -> Tensor:
        """Combine weights (T, K) from the scores of the chosen experts, before renormalising."""
        ...


class Softmax:
    """Softmax over all experts: every logit gets a gradient (Switch, Mixtral, Qwen, OLMoE)."""

    def rank(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(-1)

    def distribution(self, scores_TE: Tensor) -> Tensor:
        return scores_TE

    def weigh(self, chosen_TK: Tensor) -> Tensor:
        return chosen_TK


class Sigmoid:
    """Each expert scored by itself (DeepSeek-V3, sigma-MoE)."""

    def rank(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()

    def distribution(self, scores_TE: Tensor) -> Tensor:
        return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)

    def weigh(self, chosen_TK: Tensor) -> Tensor:
        return chosen_TK


class SoftmaxAfter:
    """Rank by logits, softmax over the chosen ones (GPT-OSS, Granite); equal to a renormalised `Softmax`."""

    def rank(self, logits_TE: Tensor) -> Tensor:
        return logits_TE

    def distribution(self, scores_TE: Tensor) -> Tensor:
        return scores_TE.softmax(-1)

    def weigh(self, chosen_TK: Tensor) -> Tensor:
        return chosen_TK.softmax(-1)


SCORES: dict[str, Score] = {"softmax": Softmax(), "sigmoid": Sigmoid(), "softmax_after": SoftmaxAfter()}
