"""Opening a Hugging Face folder: config.json, safetensors, tokenizer. Nothing else is read, and nothing is run."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ....kernels import CheckpointError, ConfigError
from ....parallel.checkpoint.lazy import LazyTensor
from ....parallel.checkpoint.safetensors_files import WEIGHTS, has_safetensors, open_safetensors
from ...build import ModelPlan
from ..scatterfold import DESCRIPTION
from ..stored import StoredModel, wanted_shapes
from .architecture import Architecture
from .architectures import ARCHITECTURES
from .config_json import CONFIG, ConfigJson
from .tensor_rules import Layout, TensorRule
from .tokenizer import carried_files, read_tokenizer

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What changes the computation of every architecture alike, and that none of ours can do.
_QUANTISED = "quantization_config"
_REFUSED = {
    _QUANTISED: "null: weights that are not quantised",
    "compression_config": "null: weights that are not quantised",
    "per_layer_config": "null: one config for all layers",
    "is_encoder_decoder": "false",
    "add_cross_attention": "false",
}


def is_huggingface(folder: Path) -> bool:
    """Whether a folder holds a config.json with a model_type, and is not one of ours."""
    folder = Path(folder)
    if (folder / DESCRIPTION).exists() or not (folder / CONFIG).is_file():
        return False
    try:
        described = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return has_safetensors(folder)
    return isinstance(described, dict) and "model_type" in described


def open_huggingface(folder: Path) -> StoredModel:
    """The model of a folder that transformers could load with `AutoModelForCausalLM`, in either layout of experts.

    Only config.json, the heads of the safetensors files and the tokenizer's JSON files are read.

    Raises: CheckpointError in one line that names the file, what it says and what is allowed: for an architecture or a
        feature that we do not have, missing, unknown or misshapen tensors, weights that are not safetensors.
    """
    folder = Path(folder)
    hf = ConfigJson.read(folder)
    architecture = _architecture(hf)
    hf = hf.with_defaults(architecture.defaults)
    _check_common(hf, architecture)
    _check_format(folder)
    try:
        groups = architecture.read_config(hf)
        plan = ModelPlan.from_config(groups)
    except CheckpointError:
        raise
    except ConfigError as error:  # what our own classes find impossible, by the names of our fields
        raise CheckpointError(f"{hf.file} describes a model that cannot be built: {error}") from None
    held = open_safetensors(folder)
    tensors = read_tensors(
        folder, architecture.tensors(plan, hf), held, wanted_shapes(plan), _ignored(architecture, hf)
    )
    if hf.flag("tie_word_embeddings"):
        _check_tied(hf, held)
    return StoredModel(
        source=folder,
        format="huggingface",
        config=groups,
        tensors=tensors,
        tokenizer=read_tokenizer(folder, hf),
        carried=carried_files(folder),
        origin=dict(hf.values_given),
    )


def read_tensors(
    folder: Path,
    rules: Sequence[TensorRule],
    held: Mapping[str, LazyTensor],
    shapes: Mapping[str, torch.Size],
    ignored: Sequence[str] = (),
) -> dict[str, LazyTensor]:
    """Our tensors of theirs.

    Args:
        folder: for messages.
        rules: of the architecture.
        held: what the folder holds, by their keys.
        shapes: of all our tensors, by our names.
        ignored: patterns of keys that hold nothing.

    Raises: CheckpointError that names the first key that is missing, unknown, or of a wrong shape or dtype.
    """
    tensors: dict[str, LazyTensor] = {}
    used: set[str] = set()
    for rule in rules:
        layout = _layout_of(rule, held)
        wanted = layout.write([LazyTensor(shapes[name], torch.float32, _unread) for name in rule.names])
        theirs = [_checked(folder, key, held, blank) for key, blank in zip(layout.keys, wanted, strict=True)]
        used.update(layout.keys)
        try:
            tensors.update(zip(rule.names, layout.read(theirs), strict=True))
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
    unknown = [key for key in held if key not in used and not any(fnmatch.fnmatch(key, glob) for glob in ignored)]
    if unknown:
        raise CheckpointError(
            f"{folder} holds {unknown[0]}, which its {CONFIG} does not ask for ({len(unknown)} such in all), allowed: "
            "the tensors of its architecture alone"
        )
    return tensors


def _architecture(hf: ConfigJson) -> Architecture:
    name = hf.get("model_type")
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    custom = ", and code that comes with a model (auto_map) is never run" if hf.get("auto_map") else ""
    raise hf.refusal("model_type", f"{', '.join(ARCHITECTURES)}{custom}")


def _check_common(hf: ConfigJson, architecture: Architecture) -> None:
    for key, allowed in _REFUSED.items():
        if hf.get(key) and not (key == _QUANTISED and _quantisation(hf) in architecture.quantisations):
            raise hf.refusal(key, allowed)
    classes = hf.get("architectures") or []
    if not isinstance(classes, list) or classes and not any(str(one).endswith("ForCausalLM") for one in classes):
        raise hf.refusal("architectures", architecture.class_name)


def _check_format(folder: Path) -> None:
    if has_safetensors(folder):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds {pickles[0]}, allowed: weights as safetensors only (no pickles are read)"
        )
    raise CheckpointError(f"{folder} holds no weights, allowed: {WEIGHTS}, or several with an index")


def _ignored(architecture: Architecture, hf: ConfigJson) -> list[str]:
    tied = ["lm_head.weight", "model.embed_tokens.weight"] if hf.flag("tie_word_embeddings") else []
    return [*architecture.ignores(hf), *tied]


def _layout_of(rule: TensorRule, held: Mapping[str, LazyTensor]) -> Layout:
    return next((one for one in rule.layouts if one.keys and one.keys[0] in held), rule.layouts[0])


def _quantisation(hf: ConfigJson) -> Any:
    """The name of the method."""
    described = hf.get(_QUANTISED)
    return described.get("quant_method") if isinstance(described, Mapping) else None


def _checked(folder: Path, key: str, held: Mapping[str, LazyTensor], blank: LazyTensor) -> LazyTensor:
    """The tensor of a key, which must have the shape of `blank`, and its dtype if that is no floating-point one."""
    tensor = held.get(key)
    if tensor is None:
        raise CheckpointError(f"{folder} lacks {key}, allowed: a folder with all tensors of its architecture")
    if tensor.shape != blank.shape:
        raise CheckpointError(
            f"{folder}: {key} is {tuple(tensor.shape)}, allowed: {tuple(blank.shape)}, which its {CONFIG} asks for"
        )
    dtypes = _FLOATS if blank.dtype.is_floating_point else (blank.dtype,)
    if tensor.dtype not in dtypes:
        raise CheckpointError(f"{folder}: {key} is {tensor.dtype}, allowed: {', '.join(str(one) for one in dtypes)}")
    return tensor


def _check_tied(hf: ConfigJson, held: Mapping[str, LazyTensor]) -> None:
    """Where both are there they must be the same: transformers does not tie them otherwise."""
    pair = [held[key] for key in ("model.embed_tokens.weight", "lm_head.weight") if key in held]
    if len(pair) < 2:
        return
    same = pair[0].shape == pair[1].shape
    for start in range(0, pair[0].shape[0] if same else 0, 4096):
        rows = [slice(start, start + 4096), slice(0, pair[0].shape[1])]
        same = same and torch.equal(pair[0].read(rows), pair[1].read(rows))
    if not same:
        raise hf.refusal(
            "tie_word_embeddings", "false, since lm_head.weight is there and is not model.embed_tokens.weight"
        )


def _unread(_: Any) -> torch.Tensor:
    raise AssertionError("a layout must tell shapes without reading")
