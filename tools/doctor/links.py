"""What connects GPUs and machines: NVLink and PCIe, network interfaces, InfiniBand."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from .ask import answer_of, read

NET, INFINIBAND = Path("/sys/class/net"), Path("/sys/class/infiniband")


def describe_links() -> dict[str, Any]:
    """`interfaces`, `infiniband` (ports) and `gpu_links` (how many pairs of GPUs have which link)."""
    return {"interfaces": interfaces(), "infiniband": infiniband(), "gpu_links": gpu_links()}


def interfaces() -> list[dict[str, Any]]:
    """Network interfaces but the loopback: name, state, MTU, and speed in Mbit/s where the driver knows it."""
    found = []
    for folder in sorted(NET.iterdir()) if NET.is_dir() else []:
        if folder.name != "lo":
            speed = read(folder / "speed")
            known = speed is not None and speed.lstrip("-").isdigit() and int(speed) > 0
            found.append(
                {
                    "name": folder.name,
                    "state": read(folder / "operstate"),
                    "mtu": int(read(folder / "mtu") or 0),
                    "megabits": int(speed) if known and speed is not None else None,
                }
            )
    return found


def infiniband() -> list[dict[str, Any]]:
    """Ports of InfiniBand and RoCE adapters: device, port, state, rate and link layer as the kernel writes them."""
    found = []
    for port in sorted(INFINIBAND.glob("*/ports/*")) if INFINIBAND.is_dir() else []:
        found.append(
            {
                "device": port.parents[1].name,
                "port": int(port.name),
                "state": (read(port / "state") or "").rpartition(": ")[2],
                "rate": read(port / "rate"),
                "layer": read(port / "link_layer"),
            }
        )
    return found


def gpu_links() -> dict[str, int]:
    """Pairs of GPUs by what connects them, as in `nvidia-smi topo -m`: NV18 is 18 NVLinks, PIX to SYS is PCIe."""
    table = re.sub(r"\x1b\[[0-9;]*m", "", answer_of("nvidia-smi", "topo", "-m") or "")
    rows = [line.split() for line in table.splitlines() if line.startswith("GPU") and "X" in line.split()]
    names = [row[0] for row in rows]
    return dict(Counter(row[1 + j] for i, row in enumerate(rows) for j in range(i + 1, len(names))))
