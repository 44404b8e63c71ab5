"""How alike the experts of a layer are, and which of them belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...kernels import Routing
from ..interop.probe import run_layers
from ..layer import MoELayer
from ..models.transformer import Transformer
from .mixture import Mixture

Batches = Sequence[Mapping[str, Any]]


def router_rows(mixture: Mixture) -> dict[int, Tensor]:
    """By layer, cosines (E, E) of the rows of the router: experts that are chosen for the same tokens."""
    return {layer: _cosines(mixture.per_expert(layer)["router.weight"].read()) for layer in mixture.layers}


def expert_weights(mixture: Mixture) -> dict[int, Tensor]:
    """By layer, cosines (E, E) of all weights of the experts; one layer's are in memory at a time."""
    found = {}
    for layer in mixture.layers:
        tensors = [t for name, t in mixture.per_expert(layer).items() if name.startswith(mixture.stack)]
        products = sum(flat @ flat.T for flat in (tensor.read().float().flatten(1) for tensor in tensors))
        assert isinstance(products, Tensor)  # there is one matrix at least
        length = products.diagonal().sqrt().clamp_min(1e-12)
        found[layer] = products / length[:, None] / length
    return found


def mean_outputs(mixture: Mixture, batches: Batches, device: torch.device | str = "cpu") -> dict[int, Tensor]:
    """By layer, cosines (E, E) of what each expert makes of all tokens in the mean (HC-SMoE, 2410.08589)."""
    sums = {layer: torch.zeros(mixture.num_experts, mixture.plan.config.width) for layer in mixture.layers}

    def add(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            assert isinstance(module, MoELayer)
            rows = module.experts.before(args[0].flatten(0, -2))
            for expert in range(mixture.num_experts):
                chosen = torch.full((rows.shape[0], 1), expert, device=rows.device)
                alone = Routing.from_topk(chosen, torch.ones_like(chosen, dtype=torch.float32), mixture.num_experts)
                sums[layer][expert] += module.experts(rows, alone).sum(0).cpu()

        return hook

    @contextmanager
    def watch(part: Transformer) -> Iterator[None]:
        hooks = [moe.register_forward_hook(add(layer)) for layer, moe in part.moe_layers()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    run_layers(mixture.stored, batches, device, watch)
    return {layer: _cosines(total) for layer, total in sums.items()}


def around_dominant(alike: Tensor, used: Tensor, experts: Sequence[int], groups: int) -> list[list[int]]:
    """Groups of the given experts: the most used are one each, the others join the one that they are most alike.

    This is the grouping of M-SMoE (2310.01334), with as many groups in every layer. The first of a group is its
    dominant expert.

    Args:
        alike: (E, E).
        used: (E,); of equally used ones the lowest ids are dominant.
    """
    ranked = sorted(experts, key=lambda expert: (-float(used[expert]), expert))
    found = {expert: [expert] for expert in sorted(ranked[:groups])}
    dominant = torch.tensor(list(found))
    for expert in sorted(ranked[groups:]):
        found[int(dominant[alike[expert, dominant].argmax()])].append(expert)
    return list(found.values())


def by_average_linkage(alike: Tensor, used: Tensor, experts: Sequence[int], groups: int) -> list[list[int]]:
    """Groups of the given experts: the two groups whose members are most alike in the mean become one, again and again.

    This is the hierarchical clustering of HC-SMoE (2410.08589). The first of a group is its most used.
    """
    members = [[expert] for expert in experts]
    linkage = alike[list(experts)][:, list(experts)].double()
    linkage.fill_diagonal_(-torch.inf)
    while len(members) > groups:
        one, other = sorted(divmod(int(linkage.argmax()), len(members)))
        sizes = len(members[one]), len(members[other])
        joined = (linkage[one] * sizes[0] + linkage[other] * sizes[1]) / sum(sizes)
        linkage[one], linkage[:, one] = joined, joined
        linkage[one, one] = -torch.inf
        stay = [at for at in range(len(members)) if at != other]
        linkage = linkage[stay][:, stay]
        members[one] += members.pop(other)
    return [sorted(group, key=lambda expert: (-float(used[expert]), expert)) for group in members]


def _cosines(rows: Tensor) -> Tensor:
    rows = normalize(rows.float(), dim=-1)
    return rows @ rows.T
