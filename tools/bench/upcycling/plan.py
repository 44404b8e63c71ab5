"""Which runs there are, and how many steps each may take for its FLOPs.

    OUTPUT/seed-S/base                  the dense training of S
    OUTPUT/seed-S/ARM/start             the upcycled weights of an arm
    OUTPUT/seed-S/ARM/extra-B           training it with B times the FLOPs of the dense training

The rate of a run warms up, stays at its peak and decays over its last fifth. So two runs of one arm and
seed are the same until the shorter one decays, and share that part: one goes on from a checkpoint of the other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....kernels import ConfigError
from ....moe.training.run_plan import RunPlan
from .arms import ARMS, Arm

BASE = "base"
FRESH_ORDER = 1000  # the seed of what follows the dense training is so much larger: other samples, another router


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        arm: a key of ARMS, or `base`.
        budget: what it may spend, in FLOPs of the dense training.
        total: it may spend the dense training's FLOPs as well, because it starts from nothing.
        flops_per_step: of forward and backward, by `ModelCounts.flops_per_token`.
        config: whole, but for run_dir, init_from and resume.
    """

    arm: str
    seed: int
    budget: float
    steps: int
    folder: Path
    tokens_per_step: int
    flops_per_step: float
    parameters: int
    active: int
    config: dict[str, Any]
    total: bool = False

    @property
    def flops(self) -> float:
        return self.steps * self.flops_per_step

    @property
    def stable_steps(self) -> int:
        """Steps before the rate decays; at least the last one is left to a run that goes on from another."""
        schedule = self.config["schedule"]
        after = max(0, self.steps - schedule["warmup_steps"])
        return min(self.steps - 1, schedule["warmup_steps"] + int((1 - schedule.get("decay_ratio", 0.0)) * after))


@dataclass(frozen=True)
class Experiment:
    """All runs of a comparison.

    Args:
        output: where they go.
        config: of the dense model's training, resolved, with the wsd schedule.
        extra: budgets, in FLOPs of the dense training.
        all_flops: also train what starts from nothing with the FLOPs of the dense training and the largest budget.
    """

    output: Path
    config: dict[str, Any]
    extra: tuple[float, ...]
    all_flops: bool = True

    def base(self, seed: int) -> Run:
        """The dense training; its rate does not decay, because training goes on."""
        warmup = self.config["schedule"]["warmup_steps"]
        constant = {"_target_": "scatterfold.moe.training.Constant", "warmup_steps": warmup}
        config = changed(self.config, {"seed": seed, "schedule": constant})
        return self._run(BASE, seed, 1.0, config["trainer"]["steps"], self.output / f"seed-{seed}" / BASE, config)

    def runs(self, name: str, seed: int) -> list[Run]:
        """The runs of one arm and seed, the longest first.

        Raises: ConfigError for a configuration that cannot be trained, or a budget without a single step.
        """
        arm = ARMS[name]
        budgets = [(budget, False) for budget in self.extra]
        if not arm.continues and self.all_flops:
            budgets.append((1.0 + max(self.extra), True))
        return [self._arm_run(name, arm, seed, budget, total) for budget, total in sorted(budgets, reverse=True)]

    def successors(self, arms: Sequence[str], seed: int) -> list[Run]:
        """The runs of several arms, those of one arm beside each other."""
        return [run for name in arms for run in self.runs(name, seed)]

    def start(self, name: str, seed: int) -> Path:
        """Where the weights that an arm begins with lie."""
        return self.output / f"seed-{seed}" / name / "start"

    def _arm_run(self, name: str, arm: Arm, seed: int, budget: float, total: bool) -> Run:
        base = self.base(seed)
        experts = {} if arm.experts is None else arm.experts.changes(self.config["model"]["ffn_width"])
        config = changed(self.config, {**experts, "seed": FRESH_ORDER + seed})
        folder = self.output / f"seed-{seed}" / name / f"extra-{budget:g}"
        run = self._run(name, seed, budget, 1, folder, config, total)
        ratio = base.flops_per_step / run.flops_per_step
        steps = steps_within(budget * base.flops, run.flops_per_step)
        if steps < 1:
            raise ConfigError(
                f"extra={budget:g} leaves no step to {name}, allowed: {1 / (ratio * base.steps):.2g} or more"
            )
        trainer = self.config["trainer"]
        paced = {  # warm-up, evaluations and checkpoints lie at the same FLOPs in every arm
            "trainer.steps": steps,
            "trainer.eval_every": _scaled(trainer["eval_every"], ratio),
            "trainer.checkpoint_every": _scaled(trainer["checkpoint_every"], ratio),
            "trainer.keep_last": 1_000_000,  # shorter runs go on from them
            "schedule.warmup_steps": _scaled(self.config["schedule"]["warmup_steps"], ratio),
        }
        return self._run(name, seed, budget, steps, folder, changed(config, paced), total)

    def _run(
        self, arm: str, seed: int, budget: float, steps: int, folder: Path, config: dict[str, Any], total: bool = False
    ) -> Run:
        plan = RunPlan.from_config(config)
        counts = plan.model.counts(plan.data.sequence_length)
        tokens = plan.data.global_batch_size * plan.data.sequence_length
        flops = tokens * counts.flops_per_token
        return Run(arm, seed, budget, steps, folder, tokens, flops, counts.total, counts.active, config, total)


def steps_within(flops: float, flops_per_step: float) -> int:
    """Whole steps that a budget pays for, never more."""
    return math.floor(flops / flops_per_step * (1 + 1e-12))  # 0.3 x 1000 steps are 300, not 299


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with other values under dotted names."""
    new = copy.deepcopy(dict(config))
    for name, value in changes.items():
        *groups, key = name.split(".")
        node = new
        for group in groups:
            node = node[group]
        node[key] = value
    return new


def _scaled(steps: int, ratio: float) -> int:
    return max(1, round(steps * ratio)) if steps else 0
