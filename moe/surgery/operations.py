"""The three operations as a user asks for them: what is checked, what has to be measured, and what is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels import ConfigError
from ..interop.stored import StoredModel
from .corpus import Corpus
from .dense import dense_config, to_dense
from .grow import Noise, copies_of, grow
from .merge import GROUPINGS, groups_of, merge
from .mixture import Mixture
from .prune import check_kept, most_used, prune
from .similarity import expert_weights, mean_outputs, router_rows
from .usage import CRITERIA, Usage

SIMILARITIES = ("router", "weights", "outputs")


@dataclass(frozen=True)
class Made:
    """A model that an operation made, not written yet.

    Attributes:
        layers: by layer, of which old experts each new one is made: their ids, the leading one first.
        notes: what a user should know about it, a sentence each.
    """

    stored: StoredModel
    layers: Mapping[int, Sequence[Sequence[int]]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation(ABC):
    """One way to change the experts of a model.

    Attributes:
        top_k: experts per token of the result (of a threshold router the upper bound); None for what the operation
            keeps.
    """

    name = "operation"
    top_k: int | None = field(default=None, kw_only=True)

    @abstractmethod
    def check(self, mixture: Mixture, has_corpus: bool) -> None:
        """Raises: ConfigError for what does not fit the model, or needs a corpus and has none."""

    @abstractmethod
    def config(self, mixture: Mixture) -> dict[str, Any]:
        """The config of the result, which does not depend on which experts are chosen."""

    @abstractmethod
    def make(self, mixture: Mixture, usage: Usage | None, corpus: Corpus | None, device: torch.device) -> Made:
        """The result, whose tensors are read when they are written.

        Args:
            usage: on the corpus; None without one.
        """


@dataclass(frozen=True)
class Prune(Operation):
    """Keep some experts of each layer: the most used on a corpus, or those that are named.

    Args:
        keep: how many; 1 makes the model dense.
        experts: which, the same in every layer; empty to go by their use.
        criterion: one of `CRITERIA`.
    """

    keep: int | None = None
    experts: tuple[int, ...] = ()
    criterion: str = CRITERIA[0]
    name = "prune"

    def check(self, mixture: Mixture, has_corpus: bool) -> None:
        if self.criterion not in CRITERIA:
            raise ConfigError(f"criterion={self.criterion} is unknown, allowed: {', '.join(CRITERIA)}")
        if self.experts:
            check_kept(mixture, self.experts)
            if self.keep not in (None, len(self.experts)):
                raise ConfigError(
                    f"keep={self.keep} with experts={list(self.experts)}, allowed: one of them, or as many as named"
                )
        elif self.keep is None:
            raise ConfigError("keep is missing, allowed: keep=N, or experts=[…] to name them")
        elif not has_corpus:
            raise ConfigError(
                f"keep={self.keep} goes by the use of the experts, allowed: data=CORPUS, or experts=[…] to name them"
            )
        if not 1 <= self.number < mixture.num_experts:
            raise ConfigError(
                f"keep={self.number} is out of range, allowed: 1 to {mixture.num_experts - 1} of the "
                f"{mixture.num_experts} experts"
            )
        if self.number == 1 and mixture.weights_sum is None and not has_corpus:
            raise ConfigError(
                "keep=1 of a router whose weights do not add up to a constant needs the mean weight of the expert that "
                "is left, allowed: data=CORPUS"
            )
        if self.number > 1:
            mixture.per_pool(self.number, "keep")
        elif self.top_k is not None:
            raise ConfigError(f"top_k={self.top_k} does not go with keep=1, which leaves no router, allowed: null")

    @property
    def number(self) -> int:
        return len(self.experts) or self.keep or 0

    def config(self, mixture: Mixture) -> dict[str, Any]:
        if self.number == 1:
            return dense_config(mixture)
        return mixture.config_of(self.number, **mixture.lowered(self.number, self.top_k))

    def make(self, mixture: Mixture, usage: Usage | None, corpus: Corpus | None, device: torch.device) -> Made:
        if self.experts or usage is None:
            kept = {layer: sorted(self.experts) for layer in mixture.layers}
        elif self.number == 1:
            scores = usage.scores(self.criterion)
            kept = {layer: [int(scores[layer].argmax())] for layer in mixture.layers}
        else:
            kept = most_used(mixture, usage.scores(self.criterion), self.number)
        layers = {layer: [[expert] for expert in experts] for layer, experts in kept.items()}
        if self.number == 1:
            return self._dense(mixture, kept, layers, usage)
        made, notes = prune(mixture, kept, self.top_k), _top_k_notes(mixture, self.config(mixture))
        if mixture.weights_sum is None and type(mixture.router.score).__name__ == "Softmax":
            notes += ("combine weights grow by 1 / (1 - mass of the pruned experts): they are not renormalised",)
        return Made(made, layers, notes)

    def _dense(self, mixture: Mixture, kept: dict[int, list[int]], layers: Any, usage: Usage | None) -> Made:
        one = {layer: experts[0] for layer, experts in kept.items()}
        fixed = mixture.weights_sum
        if fixed is None:
            assert usage is not None  # `check` has asked for a corpus
            weights = {layer: usage.mean_weight(layer, expert) for layer, expert in one.items()}
            note = "its mean combine weight is folded into the second matrix: " + ", ".join(
                f"{weight:.4g} in layer {layer}" for layer, weight in weights.items()
            )
        else:
            weights = dict.fromkeys(one, fixed)
            note = f"its combine weight was always {fixed:g}" if fixed == 1 else f"its weight {fixed:g} is folded in"
        return Made(to_dense(mixture, one, weights), layers, ("one expert is left, the model is dense", note))


@dataclass(frozen=True)
class Merge(Operation):
    """Let groups of experts become one each, their mean by use.

    Args:
        experts: how many groups.
        by: how alike two experts are: router (cosine of their rows), weights (of all their weights), outputs (of their
            mean outputs on the corpus).
        grouping: dominant or hierarchical (see `similarity`); None for dominant by=router on a corpus, else
            hierarchical.
        align: bring neurons into the same order first.
    """

    experts: int = 0
    by: str = SIMILARITIES[0]
    grouping: str | None = None
    align: bool = False
    name = "merge"

    def check(self, mixture: Mixture, has_corpus: bool) -> None:
        if self.by not in SIMILARITIES:
            raise ConfigError(f"by={self.by} is unknown, allowed: {', '.join(SIMILARITIES)}")
        if self._grouping(has_corpus) not in GROUPINGS:
            raise ConfigError(f"grouping={self.grouping} is unknown, allowed: {', '.join(GROUPINGS)}")
        if not 2 <= self.experts < mixture.num_experts:
            raise ConfigError(
                f"experts={self.experts} is out of range, allowed: 2 to {mixture.num_experts - 1} of the "
                f"{mixture.num_experts} experts"
            )
        if not has_corpus and (self.by == "outputs" or self.grouping == "dominant"):
            option = "by=outputs" if self.by == "outputs" else "grouping=dominant"
            raise ConfigError(f"{option} needs a text to run the model on, allowed: data=CORPUS")
        mixture.per_pool(self.experts, "experts")

    def _grouping(self, has_corpus: bool) -> str:
        """As those who use these similarities do, where nobody says; leaders need a corpus to be found on."""
        return self.grouping or ("dominant" if has_corpus and self.by == "router" else "hierarchical")

    def config(self, mixture: Mixture) -> dict[str, Any]:
        return mixture.config_of(self.experts, **mixture.lowered(self.experts, self.top_k))

    def make(self, mixture: Mixture, usage: Usage | None, corpus: Corpus | None, device: torch.device) -> Made:
        equal = torch.full((mixture.num_experts,), 1.0 / mixture.num_experts)
        used = dict.fromkeys(mixture.layers, equal) if usage is None else usage.scores("frequency")
        alike, grouping = self._alike(mixture, corpus, device), self._grouping(usage is not None)
        groups = groups_of(mixture, alike, used, self.experts, grouping)
        made = merge(mixture, groups, used, self.top_k, self.align)
        notes = _top_k_notes(mixture, self.config(mixture))
        if usage is None:
            notes += ("without data= the experts of a group count alike",)
        return Made(made, groups, notes)

    def _alike(self, mixture: Mixture, corpus: Corpus | None, device: torch.device) -> dict[int, Tensor]:
        if self.by == "outputs":
            assert corpus is not None  # `check` has asked for it
            return mean_outputs(mixture, corpus.used_arguments(device), device)
        return router_rows(mixture) if self.by == "router" else expert_weights(mixture)


@dataclass(frozen=True)
class Grow(Operation):
    """Add copies of experts.

    Args:
        experts: how many there will be: a multiple copies all as often, another number the most used once more.
        noise: how copies are told apart.
    """

    experts: int = 0
    noise: Noise = Noise()
    name = "grow"

    def check(self, mixture: Mixture, has_corpus: bool) -> None:
        if self.experts <= mixture.num_experts:
            raise ConfigError(
                f"experts={self.experts} is out of range, allowed: {mixture.num_experts + 1} or more, for instance "
                f"{2 * mixture.num_experts}"
            )
        if self.experts % mixture.num_experts and not has_corpus:
            copies_of(mixture, self.experts, None)  # says why
        mixture.per_pool(self.experts, "experts")

    def config(self, mixture: Mixture) -> dict[str, Any]:
        copies = dict.fromkeys(mixture.layers, [0] * self.experts)  # which ones does not matter here
        return dict(grow(mixture, copies, self.noise, self.top_k).config)

    def make(self, mixture: Mixture, usage: Usage | None, corpus: Corpus | None, device: torch.device) -> Made:
        copies = copies_of(mixture, self.experts, None if usage is None else usage.scores("weighted_frequency"))
        made = grow(mixture, copies, self.noise, self.top_k)
        layers = {layer: [[expert] for expert in origin] for layer, origin in copies.items()}
        return Made(made, layers, _top_k_notes(mixture, made.config))


def _top_k_notes(mixture: Mixture, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What changed in the router, in words."""
    before, after = mixture.stored.config["router"], config["router"]
    return tuple(
        f"router.{name} is {after[name]:g}, it was {was:g}"
        for name, was in _numbers(mixture).items()
        if name in after and after[name] != before.get(name, was) and after[name] != was
    )


def _numbers(mixture: Mixture) -> dict[str, float]:
    names, router = ("top_k", "eval_top_k", "max_experts", "scale"), mixture.router
    return {name: getattr(router, name) for name in names if hasattr(router, name)}
