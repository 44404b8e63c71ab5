"""What is compared: ways to spend the same FLOPs after a dense model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....kernels import ConfigError

DENSE, SPARSE, FINE_GRAINED, SCRATCH, SCRATCH_FINE = "dense", "sparse", "fine_grained", "scratch", "scratch_fine"


@dataclass(frozen=True)
class Experts:
    """Experts in place of the dense MLP: `copies` of it, each cut in `granularity` parts, of which a token uses top_k.

    Two parts (top_k = granularity) cost as much as the dense MLP. Weights of a token sum to one, so that upcycled
    experts begin with exactly the dense model's outputs.
    """

    copies: int
    granularity: int
    top_k: int

    @property
    def number(self) -> int:
        return self.copies * self.granularity

    def changes(self, ffn_width: int) -> dict[str, Any]:
        """What differs from the dense model. Raises: ConfigError for a width that cannot be cut."""
        if ffn_width % self.granularity:
            raise ConfigError(
                f"model.ffn_width={ffn_width} cannot be cut in {self.granularity} experts, allowed: a multiple of "
                f"{self.granularity}"
            )
        return {
            "model.num_experts": self.number,
            "model.expert_width": ffn_width // self.granularity,
            "router.top_k": self.top_k,
            "router.renormalise": True,
        }


@dataclass(frozen=True)
class Arm:
    """One way to go on.

    Attributes:
        label: for tables and legends.
        experts: None to stay dense.
        method: of `scatterfold upcycle`; None where nothing is upcycled.
        continues: it starts from the dense model's weights; else from nothing.
    """

    label: str
    experts: Experts | None = None
    method: str | None = None
    continues: bool = True


COARSE, FINE = Experts(copies=8, granularity=1, top_k=2), Experts(copies=8, granularity=2, top_k=2)

ARMS = {
    DENSE: Arm("dense, continued"),
    SPARSE: Arm("upcycled: 8 experts, top-2", COARSE, "sparse"),
    FINE_GRAINED: Arm("upcycled: 16 half experts, top-2", FINE, "fine_grained"),
    SCRATCH: Arm("from scratch: 8 experts, top-2", COARSE, continues=False),
    SCRATCH_FINE: Arm("from scratch: 16 half experts, top-2", FINE, continues=False),
}
DEFAULT_ARMS = (DENSE, SPARSE, FINE_GRAINED, SCRATCH)
