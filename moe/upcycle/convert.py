"""A dense model made into a MoE, lazily: nothing is read here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...kernels import ConfigError
from ...parallel.checkpoint.lazy import LazyTensor
from ..interop.stored import StoredModel
from .adapter import Adapter
from .branch_train_mix import BranchTrainMix
from .drop import Drop
from .fine_grained import FineGrained
from .matrices import Matrices
from .method import Method
from .noise import Noise
from .optimizer import carried_state
from .settings import UpcycleSettings
from .shared import Shared
from .sparse import Sparse

METHOD_CLASSES: dict[str, type[Method]] = {
    "sparse": Sparse,
    "fine_grained": FineGrained,
    "drop": Drop,
    "noise": Noise,
    "shared": Shared,
    "adapter": Adapter,
    "branch_train_mix": BranchTrainMix,
}


def upcycle(sources: Sequence[StoredModel], settings: UpcycleSettings) -> StoredModel:
    """The MoE that a dense model becomes; its tensors are computed when they are read.

    Every part of it depends on the sources and the settings only, so ranks may read different parts.

    Args:
        sources: one dense model; of branch_train_mix one or more of the same shape.

    Raises: ConfigError if a source is no dense model, or the settings do not fit it.
    """
    method = method_of(sources, settings)
    first = sources[0]
    tensors: dict[str, LazyTensor] = {}
    done: set[int] = set()
    for name in first.tensors:
        layer = converted_layer(name, method.layers)
        if layer is None:
            tensors[name] = method.merged([source.tensors[name] for source in sources])
        elif layer not in done:
            done.add(layer)
            prefix = f"blocks.{layer}.mlp."
            mlps = [Matrices.of(source.tensors, prefix) for source in sources]
            tensors |= {f"{prefix}{key}": value for key, value in method.tensors(mlps, layer).items()}
    result = first.with_model(method.groups(first.config), tensors)
    return result if settings.optimizer == "reset" else replace(result, optimizer=carried_state(first, result, method))


def method_of(sources: Sequence[StoredModel], settings: UpcycleSettings) -> Method:
    """The method for these sources, checked against them.

    Raises: ConfigError as `upcycle`.
    """
    if not sources:
        raise ConfigError("source=[] names no model, allowed: a dense model")
    cls = METHOD_CLASSES[settings.method]
    if len(sources) > 1 and not cls.many:
        raise ConfigError(
            f"source: {len(sources)} models are too many for method={settings.method}, allowed: one, or "
            "method=branch_train_mix"
        )
    for source in sources:
        config = source.checked().plan().config
        if config.num_experts > 1:
            raise ConfigError(
                f"source={source.source} has model.num_experts={config.num_experts}, allowed: a dense model "
                "(scatterfold experts grow adds experts to a MoE)"
            )
    _check_alike(sources, settings)
    return cls(settings, sources[0].plan().config, len(sources))


def converted_layer(name: str, layers: Sequence[int]) -> int | None:
    """The number of the layer whose MLP is replaced, if the tensor is a part of it."""
    parts = name.split(".")
    if parts[0] != "blocks" or parts[2] != "mlp" or int(parts[1]) not in layers:
        return None
    return int(parts[1])


def _check_alike(sources: Sequence[StoredModel], settings: UpcycleSettings) -> None:
    """Raise ConfigError if models that are to be mixed differ in anything but their values."""
    if settings.experts % len(sources):
        raise ConfigError(
            f"experts={settings.experts} is not a multiple of the {len(sources)} sources, allowed: a multiple"
        )
    first = sources[0]
    wanted = vars(first.plan().config)
    for other in sources[1:]:
        for field, value in vars(other.plan().config).items():
            if value != wanted[field]:
                raise ConfigError(
                    f"source={other.source} has model.{field}={value}, but {first.source} has {wanted[field]}, "
                    "allowed: models of one shape"
                )
        if _vocabulary(other) != _vocabulary(first):
            raise ConfigError(
                f"source={other.source} has another tokenizer than {first.source}, allowed: models of one vocabulary"
            )


def _vocabulary(stored: StoredModel) -> dict[str, object] | None:
    """What a tokenizer is, wherever its file lies."""
    if stored.tokenizer is None:
        return None
    return {name: value for name, value in stored.tokenizer.spec().items() if name != "path"}
