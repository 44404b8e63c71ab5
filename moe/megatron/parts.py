"""Norm and attention of a GPTModel without Transformer Engine, under sequence and context parallelism.

Megatron's own for torch refuse both (its norm sequence parallelism, its attention context parallelism), and its
attention keeps the logits of every pair of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from ...kernels.attention import Documents, attention
from ...parallel.context.attention import CONTEXT_ATTENTION, ContextAttention
from ..blocks import RMSNorm
from ..models.config import ModelConfig


def device_of(config: TransformerConfig) -> torch.device:
    """Where Megatron puts parameters."""
    return torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())


class Norm(RMSNorm):
    """RMSNorm with the constructor that Megatron calls; its gradient is summed over tp where those have own tokens."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device_of(config)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass
class Visible(PackedSeqParams):
    """What a token may see, made once per forward pass: travels through Megatron's layers to ours.

    In the format sbhd Megatron does nothing with it: positions count along the row, as in our own model.

    Attributes:
        by_window: by the window of a layer: the documents of whole sequences (None: one a row), or how to reach the
            keys of other cp ranks.
    """

    by_window: Mapping[int | None, Documents | ContextAttention | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        tokens: Tensor,
        cu_seqlens: Tensor | None,
        groups: ProcessGroupCollection,
        context_attention: str = "gather",
    ) -> Visible:
        """Args: tokens (B, S / CP) are this rank's; cu_seqlens bounds the documents of whole sequences, on the CPU."""
        windows = {model.window_of(layer) for layer in range(model.layers)}
        rows, cp = tokens.shape[0], groups.cp.size()
        length = tokens.shape[1] * cp
        if cp == 1:
            seen = dict.fromkeys(windows, Documents.of(cu_seqlens, rows, length, tokens.device))
        else:
            make = CONTEXT_ATTENTION[context_attention]
            seen = {w: make(cu_seqlens, rows, length, groups.cp, tokens.device, w) for w in windows}
        return cls(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length, by_window=seen)


class CoreAttention(MegatronModule):
    """Softmax attention of this rank's heads by `kernels.attention`: causal, within documents and windows.

    Args:
        model: ours, which says windows and sinks; `functools.partial` gives it, the others are those Megatron passes.

    Parameters: softmax_offset (H / TP,), the attention sinks, if the model has them.
    Shapes: query (S / CP, B, H / TP, W), key and value (S / CP, B, G / TP, W) -> (S / CP, B, H / TP * W).
    """

    softmax_offset: nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        model: ModelConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "dp_cp"])
        self.window = model.window_of(layer_number - 1)
        sinks = None
        if model.attention_sinks:
            heads = model.heads // self.groups.tp.size()
            sinks = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype, device=device_of(config)))
            cut(sinks, 0)
        self.register_parameter("softmax_offset", sinks)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        q, k, v = (part.transpose(0, 1) for part in (query, key, value))
        if isinstance(packed_seq_params, Visible):
            visible = packed_seq_params.by_window[self.window]
        elif attention_mask is None and packed_seq_params is None and self.groups.cp.size() == 1:
            visible = None
        else:
            raise NotImplementedError("attention masks and packed sequences reach this model as cu_seqlens only")
        if isinstance(visible, ContextAttention):
            out = visible(q, k, v, self.softmax_offset)
        else:
            out = attention(q, k, v, visible, self.window, self.softmax_offset)
        return out.flatten(-2).transpose(0, 1).contiguous()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        held = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self.groups.tp, "dp_cp_group": (metadata or {}).get("dp_cp_group", self.groups.dp_cp)}
        return make_sharded_tensors_for_checkpoint(held, prefix, {"softmax_offset": 0}, sharded_offsets, **groups)


def cut(parameter: nn.Parameter, dim: int) -> None:
    """Mark a parameter of which each rank has its own part, so that the gradient norm counts it everywhere."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
