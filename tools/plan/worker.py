"""One rank of a measurement: `python -m scatterfold.tools.plan.worker SETTINGS RESULT`."""

from __future__ import annotations

import json
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from ...moe.training.run_plan import RunPlan
from ...parallel.process import gather, running
from .measure import Steps

WARM_UP = 2


def main(settings: dict[str, Any], result: Path) -> None:
    """Measure one configuration; rank 0 writes what all ranks found."""
    plan = RunPlan.from_config(settings["config"])
    layout = plan.resolve_layout(settings["ranks"])
    with running(settings["device"]) as process:
        before = _resident()
        steps = Steps(plan, process, layout.meshes(process.device.type), settings["seed"])
        for _ in range(WARM_UP):
            steps()
        found: dict[str, Any] = {"state": steps.state_bytes(), "peak_bytes": steps.peak_bytes()}
        found["sent"] = steps.traffic()
        found["resident_growth"] = _resident() - before
        found["seconds"] = statistics.median(steps.seconds(settings["steps"]))
        everyone = gather(found)
        if process.is_main:
            result.write_text(json.dumps({"ranks": everyone, "threads": torch.get_num_threads()}))


def _resident() -> int:
    """Most bytes of this process in main memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
