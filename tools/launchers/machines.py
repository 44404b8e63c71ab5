"""How many machines a run takes, and how they find each other: flags, and the variables that torchrun reads.

Schedulers set `PET_…`, from which torchrun takes what its command line does not say; the Kubeflow training operator
sets those and MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE for each pod of a PyTorchJob. We read the same.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from ...kernels.errors import ConfigError
from ..close_match import did_you_mean

# Flag of the launcher, and the variables that stand for it, the first that is set counts.
VARIABLES = {
    "nnodes": ("PET_NNODES",),
    "nproc_per_node": ("PET_NPROC_PER_NODE", "PET_N_PROC_PER_NODE"),
    "rdzv_endpoint": ("PET_RDZV_ENDPOINT",),
    "rdzv_conf": ("PET_RDZV_CONF",),
    "max_restarts": ("PET_MAX_RESTARTS",),
    "local_addr": ("PET_LOCAL_ADDR",),
    "node_rank": ("PET_NODE_RANK",),
}
OF_A_POD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Keys of --rdzv-conf, in seconds or numbers, with what torch takes where they are not given.
RENDEZVOUS = {
    "join_timeout": 600,
    "last_call_timeout": 30,
    "close_timeout": 30,
    "heartbeat_timeout": 5,
    "keep_alive_interval": 5,
    "keep_alive_max_attempt": 3,
    "read_timeout": 60,
    "timeout": 900,
}


def take_variables(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Flags that the environment gives, as text, by their name in `VARIABLES`.

    A pod's RANK and WORLD_SIZE count pods, or ranks, by the version of the operator; they are taken out of the
    environment, because in the launcher's they would mean that it is a rank itself.
    """
    found = {
        flag: next(environment[name] for name in names if environment.get(name))
        for flag, names in VARIABLES.items()
        if any(environment.get(name) for name in names)
    }
    if "LOCAL_RANK" in environment:
        return found  # inside of a rank; the command says what is wrong
    pod = {name: environment.pop(name) for name in OF_A_POD if name in environment}
    address = environment.get("PET_MASTER_ADDR") or pod.get("MASTER_ADDR")
    port = environment.get("PET_MASTER_PORT") or pod.get("MASTER_PORT")
    if address and port:
        found.setdefault("rdzv_endpoint", f"{address}:{port}")
        if "RANK" in pod:
            found.setdefault("node_rank", pod["RANK"])
    return found


def parse_nodes(nodes: int | str, field: str = "launcher.nnodes") -> tuple[int, int]:
    """Fewest and most machines, of N or `MIN:MAX`. Raises: ConfigError."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", str(nodes))
    if match is None:
        raise ConfigError(f"{field}={nodes} is no number of machines, allowed: N, or MIN:MAX")
    least, most = int(match[1]), int(match[2] or match[1])
    if least < 1:
        raise ConfigError(f"{field}={nodes} is too small, allowed: 1 or more")
    if most < least:
        raise ConfigError(f"{field}={nodes} has a MIN above its MAX, allowed: MIN:MAX such as {most}:{least}")
    return least, most


def parse_endpoint(endpoint: str) -> str:
    """HOST:PORT as it is. Raises: ConfigError."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):(\d+)", endpoint)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ConfigError(f"launcher.rdzv_endpoint={endpoint} is no place to meet, allowed: HOST:PORT, port 1 to 65535")
    return endpoint


def parse_rendezvous(text: str | None) -> dict[str, int]:
    """Settings of the rendezvous from `KEY=NUMBER,…`. Raises: ConfigError for an unknown key or no number."""
    found: dict[str, int] = {}
    for part in (text or "").split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if not key and not value:
            continue
        if key not in RENDEZVOUS:
            guess = did_you_mean(key, RENDEZVOUS)
            raise ConfigError(f"launcher.rdzv_conf has an unknown key {key!r}{guess}, allowed: {', '.join(RENDEZVOUS)}")
        if not value.isdigit() or int(value) < 1:
            raise ConfigError(f"launcher.rdzv_conf has {key}={value}, allowed: a whole number of 1 or more")
        found[key] = int(value)
    return found
