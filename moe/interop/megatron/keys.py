"""Names of tensors on the disk: layers and experts have keys of their own, or share one key under leading dimensions.

Between the two stands the plain view, that of rules.py: one key a layer, experts under one key with a dimension for
them, gate and up in one, and one name for each norm. On the disk there may be
    decoder.layers.self_attention.…        (L, …), the layers of a model in which all are alike;
    decoder.layers.3.self_attention.…      one layer (`non_homogeneous_layers`, what recent releases write);
    ….mlp.experts.experts.linear_fc1.…     (…, E, …), whether experts are sequential or grouped;
    ….mlp.experts.experts.7.linear_fc1.…   one expert, and …weight_w, …weight_v for gate and up
                                           (`singleton_local_shards`);
    ….linear_qkv.layer_norm_weight         the norm before a matrix, by the name of the module of Transformer Engine
                                           that does both. Layers without it write that name too, for dense MLPs and
                                           experts alike; those with it the norm's own name where experts follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ....kernels import CheckpointError
from ....parallel.checkpoint.lazy import LazyTensor, cat, select, stack

PARTS = ("embedding.", "decoder.", "output_layer.")
_LAYERS = "decoder.layers."
_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_FUSED_NORMS = {plain: fused for fused, plain in _NORMS.items()}
_BALANCE = ".router.losses."  # what our balance losses remember in a checkpoint of engine=megatron
_EXPERT = re.compile(r"(.*\.experts\.experts)\.(\d+)\.(.+)")
_HALF = re.compile(r"(.*\.linear_fc1\.(?:weight|bias))_([wv])")


def plain_view(folder: Path, held: Mapping[str, LazyTensor], layers: int) -> dict[str, LazyTensor]:
    """The tensors of a model by their plain names, from whatever layout; what is no part of the model is left out.

    Args:
        folder: for messages.
        held: all tensors of the checkpoint.
        layers: L.

    Raises: CheckpointError if stacked layers are not L, or experts have gaps.
    """
    prefix = _prefix(held)
    model = {key.removeprefix(prefix): tensor for key, tensor in held.items()}
    model = {key: tensor for key, tensor in model.items() if key.startswith(PARTS) and _BALANCE not in key}
    return _plain_norms(_join_experts(folder, _join_halves(_split_layers(folder, model, layers))))


def stacked_keys(plain: Mapping[str, LazyTensor], layers: int) -> dict[str, tuple[LazyTensor, int]]:
    """Plain names as keys that all layers share; each with the number of leading dimensions that are cut on the disk.

    Every layer must have the same keys.
    """
    keys: dict[str, tuple[LazyTensor, int]] = {}
    for key, tensor in plain.items():
        name = re.sub(rf"^{re.escape(_LAYERS)}0\.", _LAYERS, key)
        if name == key and not key.startswith(_LAYERS):
            keys[key] = (tensor, 0)
        elif name != key:
            every = [plain[f"{_LAYERS}{layer}.{name.removeprefix(_LAYERS)}"] for layer in range(layers)]
            together = stack(every)
            keys |= {disk: (together, 1 + _is_experts(key)) for disk in _disk_names(name)}
    return keys


def layer_keys(plain: Mapping[str, LazyTensor]) -> dict[str, tuple[LazyTensor, int]]:
    """Plain names as keys of each layer, as `stacked_keys`."""
    return {disk: (tensor, int(_is_experts(key))) for key, tensor in plain.items() for disk in _disk_names(key)}


def _disk_names(key: str) -> list[str]:
    """A norm goes by the name that both kinds of layers ask for, or by both names where they ask for different ones.

    Layers without Transformer Engine ask for the fused name everywhere, those with it for the plain one where experts
    follow, that is where the norm's own name is the plain one.
    """
    for plain, fused in _FUSED_NORMS.items():
        if key.endswith(f".{plain}"):
            named = key.removesuffix(plain) + fused
            return [named, key] if plain == "pre_mlp_layernorm.weight" else [named]
    return [key]


def _is_experts(key: str) -> bool:
    return ".experts.experts." in key


def _prefix(held: Mapping[str, LazyTensor]) -> str:
    """What stands before every name: nothing, or module. as NeMo writes."""
    name = "embedding.word_embeddings.weight"
    return next((key.removesuffix(name) for key in held if key.endswith(name) and "optimizer" not in key), "")


def _split_layers(folder: Path, model: Mapping[str, LazyTensor], layers: int) -> dict[str, LazyTensor]:
    split: dict[str, LazyTensor] = {}
    for key, tensor in model.items():
        name = key.removeprefix(_LAYERS)
        if name == key or name.partition(".")[0].isdecimal():
            split[key] = tensor
            continue
        if not tensor.shape or tensor.shape[0] != layers:
            found = tensor.shape[0] if tensor.shape else 0
            raise CheckpointError(f"{folder}: {key} holds {found} layers, allowed: num_layers={layers}")
        split |= {f"{_LAYERS}{layer}.{name}": select(tensor, layer) for layer in range(layers)}
    return split


def _join_halves(model: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    joined: dict[str, LazyTensor] = {}
    for key, tensor in model.items():
        match = _HALF.fullmatch(key)
        if match is None:
            joined[key] = tensor
        elif match[2] == "w" and f"{match[1]}_v" in model:
            joined[match[1]] = cat([tensor, model[f"{match[1]}_v"]], 0)
    return joined


def _join_experts(folder: Path, model: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    joined: dict[str, LazyTensor] = {}
    experts: dict[str, dict[int, LazyTensor]] = {}
    for key, tensor in model.items():
        match = _EXPERT.fullmatch(key)
        if match is None:
            joined[key] = tensor
        else:
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    for key, tensors in experts.items():
        if sorted(tensors) != list(range(len(tensors))) or len({tensor.shape for tensor in tensors.values()}) > 1:
            raise CheckpointError(f"{folder}: {key} lacks some of its experts, allowed: all of them, of one shape")
        joined[key] = stack([tensors[expert] for expert in range(len(tensors))])
    return joined


def _plain_norms(model: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    renamed: dict[str, LazyTensor] = {}
    for key, tensor in model.items():
        fused = next((name for name in _NORMS if key.endswith(f".{name}")), None)
        renamed[key if fused is None else key.removesuffix(fused) + _NORMS[fused]] = tensor
    return renamed
