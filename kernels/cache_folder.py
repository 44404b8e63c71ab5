"""Where what is compiled or tuned for this machine is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """~/.cache/scatterfold, or what SCATTERFOLD_CACHE names. It may not exist yet."""
    return Path(os.environ.get("SCATTERFOLD_CACHE") or Path.home() / ".cache" / "scatterfold")
