"""How many assignments an expert takes, and which ones are dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import ConfigError

DROP_POLICIES = ("position", "probability")


@dataclass(frozen=True)
class Capacity:
    """At most C = max(min_capacity, ceil(factor * K * S / E)) assignments per expert and sequence of S tokens.

    Capacity is counted per sequence, not per micro-batch or rank, so that what is dropped does not depend on how a
    batch is split. First choices of all tokens come before second choices, and so on; within one rank of choice the
    earlier position wins (`position`, causal), or the higher probability (`probability`: better tokens kept, but a
    token's fate then depends on later ones).

    Sources: GShard 2006.16668, section 2.2; V-MoE's batch prioritized routing 2106.05974, section 4.
    """

    factor: float
    minimum: int = 4
    drop: str = "position"

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ConfigError(f"router.capacity_factor={self.factor} is out of range, allowed: null, above 0")
        if self.minimum < 1:
            raise ConfigError(f"router.min_capacity={self.minimum} is too small, allowed: 1 or more")
        if self.drop not in DROP_POLICIES:
            raise ConfigError(f"router.drop={self.drop!r} is unknown, allowed: {', '.join(DROP_POLICIES)}")

    def limit(self, experts_per_token: float, sequence_length: int, num_experts: int) -> int:
        """C."""
        exact = self.factor * experts_per_token * sequence_length / num_experts
        return max(self.minimum, math.ceil(exact - 1e-9))  # 1e-9: a factor of 1.1 must not round 11.000000000000002 up

    def keep(
        self,
        experts_TK: Tensor,
        scores_TK: Tensor,
        wanted_TK: Tensor | None,
        num_experts: int,
        num_sequences: int,
        experts_per_token: float,
    ) -> Tensor:
        """Which assignments fit, (T, K) bool; columns are ranks of choice, best first.

        Args:
            scores_TK: probabilities, for the policy of that name.
            wanted_TK: bool, assignments that count at all; None for all.
            experts_per_token: K of the formula above.
        """
        num_tokens, num_ranks = experts_TK.shape
        length = num_tokens // max(num_sequences, 1)
        sequence_T = torch.arange(num_tokens, device=experts_TK.device) // max(length, 1)
        pool_TK = sequence_T[:, None] * num_experts + experts_TK
        if wanted_TK is not None:
            pool_TK = torch.where(wanted_TK, pool_TK, num_sequences * num_experts)
        rank_K = torch.arange(num_ranks, device=experts_TK.device)
        # Rank-major order, so that stable sorts leave earlier positions first.
        priority = (pool_TK * num_ranks + rank_K).T.flatten()
        if self.drop == "probability":
            by_score = scores_TK.T.flatten().argsort(descending=True, stable=True)
            order = by_score[priority[by_score].argsort(stable=True)]
        else:
            order = priority.argsort(stable=True)
        pool = pool_TK.T.flatten()[order]
        place = torch.arange(pool.numel(), device=pool.device) - torch.searchsorted(pool, pool)
        fits = place < self.limit(experts_per_token, length, num_experts)
        fits_TK = torch.empty_like(fits).index_copy_(0, order, fits).view(num_ranks, num_tokens).T
        return fits_TK if wanted_TK is None else fits_TK & wanted_TK
