"""How the ranks of a run are arranged: so far, data parallel, replicated and sharded."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..kernels.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """World = dp_replicate x dp_shard.

    Every rank reads its own share of the global batch. Parameters, gradients and optimizer state are cut into
    dp_shard parts and kept dp_replicate times, so 1 x N is FSDP, N x 1 is DDP and M x N is hybrid-sharded (HSDP).
    Ranks of one shard group are neighbours: the group that communicates most stays within a machine.

    Attributes:
        dp_replicate: copies of the model; None for as many as the world allows.
        dp_shard: ranks over which one copy is cut.

    Raises: ConfigError for a size below 1.
    """

    dp_replicate: int | None = None
    dp_shard: int = 1

    def __post_init__(self) -> None:
        for name, size in (("dp_replicate", self.dp_replicate), ("dp_shard", self.dp_shard)):
            if size is not None and size < 1:
                raise ConfigError(f"layout.{name}={size} is too small, allowed: 1 or more")

    def resolve(self, world: int) -> ResolvedLayout:
        """Fill in what is None and check that the product is the world size.

        Raises: ConfigError that shows the product that does not work out.
        """
        if self.dp_replicate is None:
            if world % self.dp_shard:
                raise ConfigError(
                    f"layout.dp_shard={self.dp_shard} does not divide the {_ranks(world)} of this run, "
                    f"allowed: {_divisors(world)}"
                )
            return ResolvedLayout(world // self.dp_shard, self.dp_shard)
        product = self.dp_replicate * self.dp_shard
        if product != world:
            raise ConfigError(
                f"layout.dp_replicate={self.dp_replicate} x layout.dp_shard={self.dp_shard} = {product}, but this run "
                f"has {_ranks(world)}, allowed: sizes whose product is {world}"
            )
        return ResolvedLayout(self.dp_replicate, self.dp_shard)


@dataclass(frozen=True)
class ResolvedLayout:
    """A layout that fits its world."""

    dp_replicate: int
    dp_shard: int

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard

    def mesh(self, device_type: str) -> DeviceMesh:
        """The ranks as a (dp_replicate, dp_shard) mesh. Makes process groups, so every rank must call it once."""
        return init_device_mesh(
            device_type, (self.dp_replicate, self.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
        )


def _ranks(world: int) -> str:
    return "1 rank" if world == 1 else f"{world} ranks"


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)
