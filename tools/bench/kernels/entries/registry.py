"""The list of all entries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from .....kernels import BACKENDS, ConfigError, choose_backend
from ....close_match import did_you_mean
from ..case import Case, Layer
from . import deepspeed_moe, dense, gpu_peers, hugging_face, ours, pipeline

OURS, LIMIT, PEER = "ours", "limit", "peer"


@dataclass(frozen=True)
class Entry:
    """Something that is measured.

    Attributes:
        name: as the user types it.
        kind: ours, a dense limit, or a peer.
        build: makes the layer of a case; raises Refused if it does not serve it.
        package: what has to be importable, None for nothing but torch.
    """

    name: str
    kind: str
    build: Callable[[Case], Layer]
    package: str | None = None

    @property
    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None


def all_entries() -> list[Entry]:
    """Ours, the limits, the peers."""
    backends = [Entry(name, OURS, partial(ours.build, name)) for name in BACKENDS]
    plugin = partial(hugging_face.build, hugging_face.PLUGIN)
    limits = [Entry("dense_a", LIMIT, dense.build_a), Entry("dense_b", LIMIT, dense.build_b)]
    transformers = [
        Entry(f"transformers_{name}", PEER, partial(hugging_face.build, name), "transformers")
        for name in hugging_face.IMPLEMENTATIONS
    ]
    return [
        *backends,
        Entry(f"transformers_{hugging_face.PLUGIN}", OURS, plugin, "transformers"),
        *limits,
        Entry("pipeline", PEER, pipeline.build),
        *transformers,
        Entry("deepspeed", PEER, deepspeed_moe.build, "deepspeed"),
        Entry("scattermoe", PEER, gpu_peers.build_scattermoe, "scattermoe"),
        Entry("sonicmoe", PEER, gpu_peers.build_sonicmoe, "sonicmoe"),
        Entry("megablocks", PEER, gpu_peers.build_megablocks, "megablocks"),
        Entry("liger", PEER, gpu_peers.build_liger, "liger_kernel"),
    ]


def chosen_entries(names: Sequence[str] | None) -> list[Entry]:
    """Those that the user named, and the limits, which every ratio needs; all for None.

    Raises: ConfigError for a name that is none.
    """
    entries = all_entries()
    known = [entry.name for entry in entries]
    for name in names or ():
        if name not in known:
            raise ConfigError(f"entries={name} is unknown{did_you_mean(name, known)}, allowed: {', '.join(known)}")
    return [entry for entry in entries if names is None or entry.name in names or entry.kind == LIMIT]


def default_backend(case: Case) -> str:
    """The backend that a user gets who asks for none."""
    return choose_backend(case.device, case.dtype, case.shape.width, case.shape.expert_width).backend
