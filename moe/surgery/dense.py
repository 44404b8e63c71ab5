"""One expert of each layer is left, and becomes the dense MLP of its block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...kernels import ConfigError, is_gated
from ...parallel.checkpoint.lazy import LazyTensor, cat, constant, pointwise, select
from ..adapters import AdapterExperts
from ..interop.stored import StoredModel
from .mixture import Mixture

# Names of the matrices of an MLP, and the dimension of the neurons in them.
MATRICES = {"w_gate": 0, "w_up": 0, "w_out": 1}


def dense_config(mixture: Mixture) -> dict[str, Any]:
    """The config of the dense model.

    The MLP of a block is as wide as an expert and its shared expert together, which it takes in; where other blocks are
    dense and wider or narrower, all are padded to one width.

    Raises: ConfigError for what a dense MLP cannot be: adapters, experts with biases, a gated shared expert, experts
        with another activation than the MLPs beside them.
    """
    config, experts = mixture.plan.config, mixture.experts
    if isinstance(experts, AdapterExperts):
        raise ConfigError("keep=1 would leave an MLP and its adapter, which is no dense MLP, allowed: 2 or more")
    if experts.b_in is not None:
        raise ConfigError("keep=1 with experts.bias=true would need a dense MLP with biases, allowed: 2 or more")
    if config.shared_expert_gate:
        raise ConfigError("keep=1 with model.shared_expert_gate=true would need a gated MLP, allowed: 2 or more")
    others = config.shared_expert_width is not None or len(mixture.layers) < config.layers
    if others and config.activation != experts.activation:
        raise ConfigError(
            f"keep=1 with experts.activation={experts.activation} and model.activation={config.activation} would need "
            "two kinds of MLPs, allowed: 2 or more"
        )
    given, widths = mixture.stored.config, [_moe_width(mixture)]
    if len(mixture.layers) < config.layers:
        widths.append(config.ffn_width or 0)
    model = {
        **given["model"],
        "num_experts": 0,
        "ffn_width": max(widths),
        "activation": experts.activation,
    }
    for name in ("expert_width", "moe_layers", "moe_every", "first_k_dense", "shared_expert_width", "frozen"):
        model.pop(name, None)
    return {**given, "model": model}


def to_dense(mixture: Mixture, kept: Mapping[int, int], weights: Mapping[int, float]) -> StoredModel:
    """The dense model of one expert per layer.

    Args:
        kept: by layer, the expert.
        weights: by layer, its combine weight, which goes into the second matrix.

    Raises: ConfigError as `dense_config`.
    """
    config = dense_config(mixture)
    width = config["model"]["ffn_width"]
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in mixture.stored.tensors.items():
        layer = _layer_of(name)
        if layer is None:
            tensors[name] = tensor
        elif layer not in mixture.layers:
            tensors[name] = _padded(tensor, MATRICES[name.split(".")[-2]], width)
    for layer, expert in kept.items():
        for name, parts in _matrices(mixture, layer, expert, weights[layer]):
            whole = _padded(cat(parts, MATRICES[name]), MATRICES[name], width)
            tensors[f"blocks.{layer}.mlp.{name}.weight"] = whole
    return mixture.stored.with_model(config, tensors)


def _layer_of(name: str) -> int | None:
    """The block whose MLP a tensor belongs to."""
    words = name.split(".")
    return int(words[1]) if words[0] == "blocks" and words[2] == "mlp" else None


def _moe_width(mixture: Mixture) -> int:
    config = mixture.plan.config
    return (config.expert_width or 0) + (config.shared_expert_width or 0)


def _matrices(mixture: Mixture, layer: int, expert: int, weight: float) -> Iterator[tuple[str, Sequence[LazyTensor]]]:
    """Each matrix of a dense MLP, as those of the expert and of the shared expert beside it."""
    prefix, stored = f"blocks.{layer}.mlp.", mixture.stored.tensors
    inputs, output = (select(stored[f"{prefix}experts.{name}"], expert) for name in ("w_in", "w_out"))
    own = {"w_out": output if weight == 1.0 else pointwise(output, lambda values: values.float() * weight)}
    if is_gated(mixture.experts.activation):
        own |= {"w_gate": select(inputs, 0), "w_up": select(inputs, 1)}
    else:
        own["w_up"] = inputs
    for name, matrix in own.items():
        shared = stored.get(f"{prefix}shared.{name}.weight")
        yield name, [matrix] if shared is None else [matrix, shared]


def _padded(matrix: LazyTensor, dim: int, width: int) -> LazyTensor:
    """Neurons whose weights are zero, which add nothing, up to a width."""
    missing = width - matrix.shape[dim]
    if missing == 0:
        return matrix
    shape = [missing if at == dim else size for at, size in enumerate(matrix.shape)]
    return cat([matrix, constant(0.0, shape, matrix.dtype)], dim)
