"""What an architecture of Hugging Face is to us: one object a `model_type`.

To add one, add a file to `architectures/` that ends with `ARCHITECTURE = ...`; nothing else changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ...build import ModelPlan
from .config_json import ConfigJson
from .tensor_rules import TensorRule

Groups = dict[str, Any]  # model, router, experts, dispatcher: what `ModelPlan.from_config` takes


class Architecture(ABC):
    """One `model_type`, both ways.

    Attributes:
        model_type: in config.json, and the name by which a user asks for it.
        class_name: of the model class of transformers.
        defaults: every key of config.json on which its computation depends, with the value that the class of
            transformers takes where the file does not say. Keys that are in no architecture's defaults say nothing
            about the computation and go along unchanged.
        ignored: glob patterns of keys in the weights that hold nothing (buffers that old versions saved).
        quantisations: values of quantization_config.quant_method whose weights it reads.
    """

    model_type: ClassVar[str]
    class_name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]
    ignored: ClassVar[Sequence[str]] = ("*.rotary_emb.inv_freq",)
    quantisations: ClassVar[Sequence[str]] = ()

    def ignores(self, hf: ConfigJson) -> Sequence[str]:
        """Glob patterns of keys in the weights of this folder that are left unread."""
        return self.ignored

    @abstractmethod
    def read_config(self, hf: ConfigJson) -> Groups:
        """Our groups of a config.json. Keys that are missing in it come from `defaults`.

        Raises: CheckpointError (from the methods of `ConfigJson`) that names file, key, value and what is allowed.
        """

    @abstractmethod
    def write_config(self, plan: ModelPlan) -> dict[str, Any]:
        """Their keys of a model: all of `defaults`, so that nothing is left to a default.

        Raises: Misfit that names the first field which this architecture cannot say.
        """

    @abstractmethod
    def tensors(self, plan: ModelPlan, hf: Mapping[str, Any]) -> Sequence[TensorRule]:
        """Rules for all tensors of a model, in the order of writing: every tensor of ours is in exactly one of them.

        Args:
            plan: our side.
            hf: their config.json, as read or as `write_config` made it.
        """
