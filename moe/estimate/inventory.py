"""The parameters of a model, and what a rank holds of each: the rules of `parallel.engines.sharding` on shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...parallel.layout import ResolvedLayout
from ..build import ModelPlan
from ..sharding import sharding_plan


@dataclass(frozen=True)
class Parameter:
    """One parameter of the whole model.

    Attributes:
        shape: whole.
        tp_dim, etp_dim: the dimension that tensor, or expert tensor, parallelism cuts; None for none.
        is_expert: stacked over the experts in dimension 0, over which ep cuts.
        exact: must not travel in bfloat16: vectors, and what computes in float32.
        in_unit: gathered with its block; the others (embedding, norm, head) are gathered with the whole model.
        is_product: a matrix that autocast casts to bfloat16.
        trained: gets a gradient.
    """

    shape: tuple[int, ...]
    tp_dim: int | None = None
    etp_dim: int | None = None
    is_expert: bool = False
    exact: bool = False
    in_unit: bool = True
    is_product: bool = False
    trained: bool = True


@dataclass(frozen=True)
class Inventory:
    """All parameters, layers of the same kind stated once.

    Attributes:
        kinds: the parameters of one layer of each kind.
        layers: number of the kind of each layer.
        first, last: what is where the first layer is (embedding), and where the last one is (norm, head).
    """

    kinds: tuple[tuple[Parameter, ...], ...]
    layers: tuple[int, ...]
    first: tuple[Parameter, ...]
    last: tuple[Parameter, ...]

    @classmethod
    def of(cls, plan: ModelPlan) -> Inventory:
        """Read from the model itself, built without memory, and from what it tells an engine."""
        with torch.device("meta"):
            model = plan.make_model()
        sharding = sharding_plan([model])
        experts = {
            id(parameter): stacked.cuts.get(name)
            for stacked in sharding.experts
            for name, parameter in stacked.module.named_parameters(recurse=False)
        }
        exact = {id(parameter) for module in sharding.float32 for parameter in module.parameters()}
        layers: dict[int, list[Parameter]] = {layer: [] for layer in range(plan.config.layers)}
        first: list[Parameter] = []
        last: list[Parameter] = []
        for name, tensor in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            dims = getattr(sharding.tensor_styles.get(module), "dims", {})
            in_unit = name.startswith("blocks.")
            etp_dim = experts.get(id(tensor))
            found = Parameter(
                shape=tuple(tensor.shape),
                tp_dim=dims.get(leaf),
                etp_dim=None if etp_dim is None else etp_dim % tensor.ndim,
                is_expert=id(tensor) in experts,
                exact=in_unit and (tensor.ndim < 2 or id(tensor) in exact),
                in_unit=in_unit,
                is_product=tensor.ndim >= 2 and id(tensor) not in exact and not name.startswith("embedding."),
                trained=tensor.requires_grad,
            )
            if in_unit:
                layers[int(name.split(".")[1])].append(found)
            else:
                (first if name.startswith("embedding.") else last).append(found)
        kinds = list(dict.fromkeys(tuple(parameters) for parameters in layers.values()))
        return cls(tuple(kinds), tuple(kinds.index(tuple(p)) for p in layers.values()), tuple(first), tuple(last))

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        parameters = [*self.first, *self.last, *(p for kind in self.layers for p in self.kinds[kind])]
        return sum(math.prod(parameter.shape) for parameter in parameters)


@dataclass(frozen=True)
class Held:
    """What one rank holds of a parameter, in elements.

    Attributes:
        stored: always there. What does not divide is rounded up: FSDP pads its parts.
        gathered: while it is used: the slice of tp, ep and etp, of all FSDP ranks.
        shards: FSDP ranks that share it; 1 where FSDP does not manage it.
        sums: which groups sum its gradient besides or after FSDP, by their names in `ResolvedLayout.groups`.
    """

    parameter: Parameter
    stored: int
    gathered: int
    shards: int
    sums: tuple[str, ...]

    @property
    def by_fsdp(self) -> bool:
        return self.shards > 1


def held(parameter: Parameter, layout: ResolvedLayout, precision: str) -> Held:
    """Apply the rules of `sharding.places`, `sharding.shard_dimension` and `sharding.gradient_groups` to a shape.

    tp, and ep and etp, cut first. FSDP then cuts dimension 0, into unequal parts if need be; where that dimension has
    been cut before, the first that divides; and leaves the parameter whole if there is none, if it must not travel in
    bfloat16, or if all tp ranks share it.
    """
    cut = {dim: 1 for dim in range(len(parameter.shape))}
    by_tp = by_etp = 1
    if parameter.is_expert:
        cut[0] *= layout.ep
        if parameter.etp_dim is not None:
            by_etp = layout.etp
            cut[parameter.etp_dim] *= layout.etp
    elif parameter.tp_dim is not None:
        by_tp = layout.tp
        cut[parameter.tp_dim] *= layout.tp
    local = [math.ceil(size / cut[dim]) for dim, size in enumerate(parameter.shape)]
    folded = parameter.is_expert and layout.is_folded
    sharded = layout.dp_shard > 1
    ways = (layout.edp_shard if folded else layout.dp_shard * layout.cp) if sharded else 1
    shared_by_tp = layout.tp > 1 and by_tp == 1 and not folded
    dim = _shard_dimension(parameter.shape, cut, ways)
    whole = ways == 1 or dim is None or shared_by_tp or (parameter.exact and precision == "bf16")
    gathered = math.prod(local)
    if folded:
        sums = (("edp_replicate", "edp_shard") if whole else ("edp_replicate",)) + (
            ("etp",) if by_etp == 1 and layout.etp > 1 else ()
        )
    elif whole:
        sums = ("dp_replicate", "dp_cp") if by_tp > 1 else ("stage",)
    else:
        sums = ("dp_replicate",)
    if whole:
        return Held(parameter, gathered, gathered, 1, sums)
    assert dim is not None
    stored = gathered // local[dim] * math.ceil(local[dim] / ways)
    return Held(parameter, stored, gathered, ways, sums)


def _shard_dimension(shape: Sequence[int], cut: dict[int, int], ways: int) -> int | None:
    if cut.get(0, 1) == 1:
        return 0
    return next((dim for dim, size in enumerate(shape) if size % (cut[dim] * ways) == 0), None)


def group_size(layout: ResolvedLayout, name: str) -> int:
    """Ranks of a kind of group, by its name in `ResolvedLayout.groups`."""
    return {"dp_cp": layout.dp_shard * layout.cp}.get(name) or getattr(layout, name)
