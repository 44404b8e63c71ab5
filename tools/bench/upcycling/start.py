"""The weights that an upcycled arm begins with."""

from __future__ import annotations

from pathlib import Path

from ....moe.interop.open import open_model
from ....moe.interop.write import write_model
from ....moe.upcycle import UpcycleSettings, upcycle
from .arms import Experts


def make_start(experts: Experts, method: str, source: Path, output: Path, seed: int) -> None:
    """Upcycle the dense model in `source` into a new folder; a folder that is there is whole and stays."""
    if output.exists():
        return
    settings = UpcycleSettings(
        experts=experts.number, top_k=experts.top_k, method=method, granularity=experts.granularity, seed=seed
    )
    write_model(upcycle([open_model(source)], settings), output, to="scatterfold")
