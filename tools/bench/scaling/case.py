"""What is measured: a small model and the layouts of each number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....kernels import ConfigError
from ....parallel.layout import Layout

DEFAULT_LAYOUTS = {
    1: ("dp_replicate=1",),
    2: ("dp_replicate=2", "dp_shard=2", "ep=2", "tp=2", "cp=2", "pp=2"),
    4: (
        "dp_replicate=4",
        "dp_shard=4",
        "dp_replicate=2 dp_shard=2",
        "dp_shard=4 ep=4",
        "ep=2 etp=2",
        "dp_shard=2 tp=2 ep=4",
        "tp=4",
        "cp=4",
        "pp=2 dp_shard=2 ep=2",
    ),
}


@dataclass(frozen=True)
class Model:
    """Sizes of the model and of its batch.

    Attributes:
        sequences: of the global batch; every layout has the same batch.
        micro_batches: into which a data-parallel rank cuts its share.
    """

    layers: int = 4
    width: int = 256
    heads: int = 8
    experts: int = 8
    top_k: int = 2
    expert_width: int = 256
    vocabulary: int = 512
    length: int = 128
    sequences: int = 8
    micro_batches: int = 2


def parse_layouts(text: str, ranks: Sequence[int]) -> list[tuple[int, str]]:
    """Pairs of ranks and a layout; the layouts are `size=N size=N`, separated by `;`, or the defaults.

    Raises: ConfigError for what is no layout of any of the given numbers of ranks.
    """
    if not text.strip():
        return [(count, layout) for count in ranks for layout in DEFAULT_LAYOUTS.get(count, (f"dp_shard={count}",))]
    found = []
    for written in filter(None, (part.strip() for part in text.split(";"))):
        layout, fits, reason = read_layout(written), False, ""
        for count in ranks:
            try:
                layout.resolve(count)
            except ConfigError as error:
                reason = str(error)
                continue
            found.append((count, written))
            fits = True
        if not fits:
            raise ConfigError(f"layouts={written!r}: {reason}")
    return sorted(found, key=lambda pair: pair[0])


def read_layout(text: str) -> Layout:
    """`dp_shard=2 ep=2` as a layout. Raises: ConfigError."""
    sizes: dict[str, int] = {}
    for word in text.split():
        name, _, size = word.partition("=")
        if name not in Layout.__dataclass_fields__ or not size.isdigit():
            allowed = ", ".join(Layout.__dataclass_fields__)
            raise ConfigError(f"layouts={text!r}: {word} is no size of a layout, allowed: NAME=NUMBER of {allowed}")
        sizes[name] = int(size)
    return Layout(**sizes)
