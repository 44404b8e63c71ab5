"""The registry: every file of this folder states one `ARCHITECTURE`."""

from __future__ import annotations

import importlib
import pkgutil

from ..architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    module.ARCHITECTURE.model_type: module.ARCHITECTURE
    for name in sorted(found.name for found in pkgutil.iter_modules(__path__))
    for module in [importlib.import_module(f"{__name__}.{name}")]
}
