"""What every router does: logits, decision, weights, losses and figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...kernels import ConfigError, Routing
from ..context import ALONE, StepContext
from ..recompute import remember
from .capacity import Capacity
from .losses import Decision, GlobalBatchBalance, MicroBatchBalance, RouterLoss, SequenceBalance, ZLoss
from .output import RouterOutput
from .scores import Score
from .sequences import SequenceParts


@dataclass(frozen=True)
class Choice:
    """Experts that tokens want, best first.

    Attributes:
        experts: (T, K) int64, distinct ids within a row.
        wanted: (T, K) bool, entries that count, where tokens take different numbers of experts; None for all.
    """

    experts: Tensor
    wanted: Tensor | None = None


@dataclass(frozen=True)
class _Verdict:
    """A choice after capacity, and its counts: everything that recomputation must not decide again."""

    choice: Choice
    kept: Tensor | None
    counts: Tensor
    loss_counts: Tensor
    dropped: Tensor


class Router(nn.Module, ABC):
    """A linear gate whose scores decide which experts a token takes.

    Everything is computed in float32 at least, whatever the precision of the model. The decision is taken through
    `moe.recompute.remember`, so that activation checkpointing replays it. A router is a subclass with three methods:
    `choose` (a decision, no gradient), `weigh` (combine weights of the decision) and `max_experts_per_token`; its
    constructor ends with `reset_parameters()`.

    Args:
        width: D.
        num_experts: E.
        score: how logits become scores.
        experts_per_token: K in the formula of the capacity.
        gate_bias: learn a bias of the logits.
        jitter: in training, multiply the router's input by noise from U(1 - jitter, 1 + jitter).
        capacity_factor: largest load of an expert over the balanced one, per sequence; None drops nothing.
        eval_capacity_factor: the same in evaluation mode.
        min_capacity: assignments per sequence that every expert can take.
        drop: which assignments an expert refuses first, `position` or `probability`.
        balance_micro_batch, balance_sequence, balance_global_batch, z_loss: coefficients of the auxiliary losses of
            `moe.routers.losses`; 0 leaves one out.

    Parameters and buffers: weight (E, D), bias (E,) if gate_bias; `losses.balance_global_batch.load` (E,) float32.
    Buffers stay in float32 when the module is cast.
    Shapes: hidden (T, D) -> RouterOutput.
    Raises: ConfigError for a value out of range.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        width: int,
        num_experts: int,
        score: Score,
        experts_per_token: float,
        *,
        gate_bias: bool,
        jitter: float,
        capacity_factor: float | None,
        eval_capacity_factor: float | None,
        min_capacity: int,
        drop: str,
        balance_micro_batch: float,
        balance_sequence: float,
        balance_global_batch: float,
        z_loss: float,
    ) -> None:
        super().__init__()
        for name, size in (("width", width), ("num_experts", num_experts)):
            if size < 1:
                raise ConfigError(f"model.{name}={size} is too small, allowed: 1 or more")
        if not 0 <= jitter < 1:
            raise ConfigError(f"router.jitter={jitter} is out of range, allowed: 0 to below 1")
        self.width, self.num_experts, self.experts_per_token = width, num_experts, experts_per_token
        self.score, self.jitter = score, jitter
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_experts)) if gate_bias else None)
        self.capacity, self.eval_capacity = (
            None if factor is None else Capacity(factor, min_capacity, drop)
            for factor in (capacity_factor, eval_capacity_factor)
        )
        losses: dict[str, RouterLoss] = {
            "balance_micro_batch": MicroBatchBalance("balance_micro_batch", balance_micro_batch),
            "balance_sequence": SequenceBalance("balance_sequence", balance_sequence),
            "balance_global_batch": GlobalBatchBalance("balance_global_batch", balance_global_batch, num_experts),
            "z_loss": ZLoss("z_loss", z_loss),
        }
        self.losses = nn.ModuleDict({name: loss for name, loss in losses.items() if loss.coefficient > 0})

    @property
    @abstractmethod
    def max_experts_per_token(self) -> int:
        """Upper bound of the experts that a token takes."""

    @abstractmethod
    def choose(self, scores_TE: Tensor) -> Choice:
        """The experts each token wants, by its scores. Called without gradient."""

    @abstractmethod
    def weigh(self, chosen_TK: Tensor, choice: Choice) -> Tensor:
        """Combine weights (T, K) from the scores of the chosen experts; what is not wanted may hold anything finite."""

    def choose_for_losses(self, scores_TE: Tensor, choice: Choice) -> Choice:
        """The choice that balance losses count: the choice itself, unless something but the scores moved it."""
        return choice

    def reset_parameters(self) -> None:
        """Small random logits, so that loads are near balance at the start; no bias."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Bring the state that no gradient changes to its start; needed after `to_empty`."""
        for loss in self._own_losses():
            loss.reset_buffers()

    @torch.no_grad()
    def finish_step(self, counts: Tensor) -> None:
        """Learn from the load of an optimizer step that was carried out.

        Args:
            counts: (E,) assignments before dropping, summed over all micro-batches and ranks.
        """
        for loss in self._own_losses():
            loss.finish_step(counts)

    def forward(self, hidden_TD: Tensor, context: StepContext = ALONE) -> RouterOutput:
        if hidden_TD.shape[0] % context.num_sequences:
            raise ConfigError(
                f"{hidden_TD.shape[0]} tokens cannot be context.num_sequences={context.num_sequences} sequences of one "
                "length"
            )
        with torch.autocast(hidden_TD.device.type, enabled=False):
            logits_TE = self._logits(hidden_TD)
            scores_TE = self.score.rank(logits_TE)
            verdict = remember(lambda: self._decide(scores_TE.detach(), context))
            experts_TK = verdict.choice.experts
            weights_TK = self.weigh(scores_TE.gather(1, experts_TK), verdict.choice)
            routing = Routing.from_topk(experts_TK, weights_TK, self.num_experts, keep=verdict.kept)
            probs_TE = self.score.distribution(scores_TE)
            decision = Decision(logits_TE, probs_TE, verdict.loss_counts)
            losses = {name: loss(decision) for name, loss in self.losses.items()} if self.training else {}
            entropy = torch.special.entr(probs_TE.detach()).sum()
        return RouterOutput(routing, losses, verdict.counts, verdict.dropped, entropy)

    def _own_losses(self) -> Iterable[RouterLoss]:
        return cast(Iterable[RouterLoss], self.losses.values())

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        hidden_TD = hidden_TD.to(dtype)
        if self.training and self.jitter > 0:
            hidden_TD = hidden_TD * torch.empty_like(hidden_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(hidden_TD, self.weight.to(dtype), bias)

    @torch.no_grad()
    def _decide(self, scores_TE: Tensor, context: StepContext) -> _Verdict:
        num_sequences, parts = context.num_sequences, SequenceParts.of(context)
        choice = self.choose(scores_TE)
        loss_choice = self.choose_for_losses(scores_TE, choice)
        loss_counts = _count(loss_choice, num_sequences, self.num_experts)
        counts = loss_counts if loss_choice is choice else _count(choice, 1, self.num_experts)
        counts = counts.sum(0)
        if parts is not None and self.training and any(loss.reads_counts for loss in self._own_losses()):
            loss_counts = parts.sum(loss_counts)
        capacity = self.capacity if self.training else self.eval_capacity
        if capacity is None:
            dropped = torch.zeros((), dtype=torch.int64, device=scores_TE.device)
            return _Verdict(choice, choice.wanted, counts, loss_counts, dropped)
        kept = self._keep(capacity, choice, scores_TE, num_sequences, parts)
        return _Verdict(choice, kept, counts, loss_counts, counts.sum() - kept.sum())

    def _keep(
        self, capacity: Capacity, choice: Choice, scores_TE: Tensor, num_sequences: int, parts: SequenceParts | None
    ) -> Tensor:
        """Which of the choices fit, (T, K) bool: decided on whole sequences by every rank that has a part of them."""
        experts_TK, wanted_TK = choice.experts, choice.wanted
        scores_TK = scores_TE.gather(1, experts_TK)
        if parts is not None:
            listed = experts_TK if wanted_TK is None else torch.where(wanted_TK, experts_TK, self.num_experts)
            experts_TK = parts.whole(listed.to(torch.int32)).long()
            if wanted_TK is not None:
                wanted_TK = experts_TK < self.num_experts
            scores_TK = parts.whole(scores_TK) if capacity.drop == "probability" else scores_TK
        kept_TK = capacity.keep(
            experts_TK, scores_TK, wanted_TK, self.num_experts, num_sequences, self.experts_per_token
        )
        return kept_TK if parts is None else parts.own(kept_TK)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move buffers, but never cast them: a bias of 0.25 in bfloat16 cannot take a step of 0.001."""
        before = {name: buffer for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):
            if buffer.dtype != before[name].dtype:
                owner = self.get_submodule(name.rpartition(".")[0])
                old = before[name]
                exact = torch.empty_like(buffer, dtype=old.dtype) if old.is_meta else old.to(buffer.device)
                owner._buffers[name.rpartition(".")[2]] = exact
        return self

    def extra_repr(self) -> str:
        return f"{self.width} -> {self.num_experts} experts, up to {self.max_experts_per_token} per token"


def _count(choice: Choice, num_sequences: int, num_experts: int) -> Tensor:
    """Wanted assignments per sequence and expert, (B, E) int64."""
    experts_TK = choice.experts
    length = max(experts_TK.shape[0] // max(num_sequences, 1), 1)
    sequence_T = torch.arange(experts_TK.shape[0], device=experts_TK.device) // length
    pool = (sequence_T[:, None] * num_experts + experts_TK).flatten()
    ones = torch.ones_like(pool) if choice.wanted is None else choice.wanted.flatten().long()
    counts = torch.zeros(num_sequences * num_experts, dtype=torch.int64, device=pool.device)
    return counts.scatter_add_(0, pool, ones).view(num_sequences, num_experts)
