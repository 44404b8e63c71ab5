"""Hours and money."""

from __future__ import annotations

from dataclasses import dataclass

from ...moe.estimate import StepTime


@dataclass(frozen=True)
class Cost:
    """What training on so many tokens takes.

    Attributes:
        gpus: devices.
        tokens: of the whole run; None for no hours.
        price_per_hour: of one device; None for no cost.
    """

    gpus: int
    tokens: float | None = None
    price_per_hour: float | None = None

    def hours(self, time: StepTime) -> float | None:
        """Of the clock, without evaluation, checkpoints and restarts."""
        return None if self.tokens is None else self.tokens / time.tokens_per_second / 3600

    def price(self, time: StepTime) -> float | None:
        hours = self.hours(time)
        return None if hours is None or self.price_per_hour is None else hours * self.gpus * self.price_per_hour

    def as_dict(self, time: StepTime) -> dict[str, float]:
        found = {"hours": self.hours(time), "cost": self.price(time)}
        return {name: value for name, value in found.items() if value is not None}
