"""One rank of `scatterfold doctor ranks=N`: `python -m scatterfold.tools.doctor.worker SETTINGS RESULT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ...parallel.process import running
from .ranks import check_ranks


def main(settings: dict[str, Any], result: Path) -> None:
    """Check the ranks; rank 0 writes the result."""
    with running(settings["device"], timeout_s=60) as process:
        found = check_ranks(process)
        if process.is_main:
            result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
