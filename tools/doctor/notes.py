"""What a person should look at, of all that the doctor found: nothing computes wrong, but it may be slow or break."""

from __future__ import annotations

from typing import Any

GIB = 2**30
LEAST_SHARED_MEMORY = 1 * GIB  # Docker gives 64 MiB unless told otherwise
LEAST_DISK = 10 * GIB
LEAST_OPEN_FILES = 4096
SLOW_DISK = 50e6  # bytes a second; a checkpoint of 10 GB then takes over three minutes


def notes(machine: dict[str, Any]) -> list[str]:
    """One line each, for what `describe_machine` found."""
    return [*_of_gpus(machine), *_of_links(machine), *_of_storage(machine)]


def _of_gpus(machine: dict[str, Any]) -> list[str]:
    lines = []
    for number, gpu in enumerate(machine["clocks"]["gpus"]):
        if gpu["held_down_by"]:
            lines.append(f"GPU {number} is held down by: {', '.join(gpu['held_down_by'])} ({gpu['clock_mhz']:g} MHz)")
        if gpu["ecc_errors"]:
            lines.append(f"GPU {number} has had {gpu['ecc_errors']:g} memory errors that could not be corrected")
        if gpu["persistence"] is False:
            lines.append(f"GPU {number} has persistence off: its first use takes seconds (nvidia-smi -pm 1)")
        if gpu["pcie_width"] and gpu["max_pcie_width"] and gpu["pcie_width"] < gpu["max_pcie_width"]:
            lines.append(f"GPU {number} has {gpu['pcie_width']:g} of {gpu['max_pcie_width']:g} PCIe lanes")
    if machine["clocks"]["cpu"]["governor"] == "powersave":
        lines.append("the CPU saves power (governor powersave): performance is faster")
    return lines


def _of_links(machine: dict[str, Any]) -> list[str]:
    lines = [
        f"InfiniBand {port['device']} port {port['port']} is {port['state'] or 'in an unknown state'}"
        for port in machine["links"]["infiniband"]
        if port["state"] != "ACTIVE"
    ]
    locked = machine["limits"]["locked_memory_bytes"]
    if machine["links"]["infiniband"] and locked is not None:
        lines.append(f"locked memory is limited to {locked / 2**20:,.0f} MiB: InfiniBand wants ulimit -l unlimited")
    return lines


def _of_storage(machine: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("disk", "temporary"):
        disk = machine[name]
        where = disk.get("run_dir") or disk["folder"]
        if disk.get("problem"):
            lines.append(f"{where} cannot be written: {disk['problem']}")
        if disk["free_bytes"] < LEAST_DISK:
            lines.append(f"{where} has only {disk['free_bytes'] / GIB:,.1f} GiB left")
        if disk.get("write_bytes_per_second", SLOW_DISK) < SLOW_DISK:
            lines.append(f"{where} takes only {disk['write_bytes_per_second'] / 1e6:,.0f} MB/s")
    shared = machine["shared_memory_bytes"]
    if shared is not None and shared < LEAST_SHARED_MEMORY:
        lines.append(f"/dev/shm has only {shared / 2**20:,.0f} MiB: NCCL wants more (docker --shm-size)")
    files = machine["limits"]["open_files"]
    if files is not None and files < LEAST_OPEN_FILES:
        lines.append(f"only {files} files may be open: ulimit -n 65536")
    return lines
