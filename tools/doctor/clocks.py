"""How fast GPUs and CPUs are allowed to run, and whether GPU memory has failed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .ask import answer_of, read

FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")
# Fields of `nvidia-smi --query-gpu`, and what we call them.
FIELDS = {
    "clocks.sm": "clock_mhz",
    "clocks.max.sm": "max_clock_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
    "persistence_mode": "persistence",
    "ecc.errors.uncorrected.volatile.total": "ecc_errors",
    "pcie.link.width.current": "pcie_width",
    "pcie.link.width.max": "max_pcie_width",
}
# Drivers before 535 have the second name for why a clock is low.
REASONS_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of that field that mean trouble; idle and a power cap of one's own choice are none.
REASONS = {
    0x8: "hardware slowdown",
    0x20: "software thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}


def describe_clocks() -> dict[str, Any]:
    """`gpus` (by nvidia-smi; empty without) and `cpu`: governor and MHz, None where the kernel does not say."""
    now, most = read(FREQUENCY / "scaling_cur_freq"), read(FREQUENCY / "cpuinfo_max_freq")
    return {
        "gpus": gpu_clocks(),
        "cpu": {
            "governor": read(FREQUENCY / "scaling_governor"),
            "mhz": int(now) / 1000 if now else None,
            "max_mhz": int(most) / 1000 if most else None,
            "load": os.getloadavg()[0],
        },
    }


def gpu_clocks() -> list[dict[str, Any]]:
    """Clocks, temperature, power, PCIe width, ECC errors of each GPU, and why its clock is held down."""
    for reasons in REASONS_FIELDS:
        fields = ",".join([*FIELDS, reasons])
        text = answer_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
        if text is not None:
            return [_gpu(line) for line in text.splitlines() if line.strip()]
    return []


def _gpu(line: str) -> dict[str, Any]:
    *values, reasons = [word.strip() for word in line.split(",")]
    found: dict[str, Any] = {name: _number(value) for name, value in zip(FIELDS.values(), values)}
    try:
        bits = int(reasons, 16)
    except ValueError:  # [N/A]
        bits = 0
    return found | {"held_down_by": [words for bit, words in REASONS.items() if bits & bit]}


def _number(text: str) -> float | bool | None:
    """A number; Enabled and Disabled as a truth value; None for what the GPU does not have."""
    if text in ("Enabled", "Disabled"):
        return text == "Enabled"
    try:
        return float(text)
    except ValueError:
        return None
