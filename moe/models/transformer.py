"""The decoder-only transformer, dense or with experts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels import ConfigError
from ...kernels.attention import Documents
from ...kernels.cross_entropy import linear_cross_entropy
from ...parallel.context.attention import CONTEXT_ATTENTION
from ...parallel.context.zigzag import check_length, own_part
from ...parallel.dispatchers import Dispatcher
from ...parallel.meshes import ALONE as ONE_PROCESS
from ...parallel.meshes import Meshes
from ...parallel.tensor import vocabulary
from ..adapters import AdapterExperts
from ..blocks import MLP, Block, KeyValueCache, RMSNorm, RotaryTable, SelfAttention
from ..blocks.attention import Visible
from ..blocks.block import CHECKPOINTING
from ..blocks.rope import Rotation
from ..context import ALONE, StepContext
from ..experts import Experts
from ..layer import MoELayer
from ..offload import offloaded
from ..routers.base import Router
from .config import ModelConfig, check_tensor_parallel
from .frozen import freeze
from .init import initialise
from .parts import make_attention, make_mlp

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head; or one pipeline part of them, under the names of the whole.

    Built under `torch.device("meta")` it takes no memory: `to_empty` and `reset_parameters` then give the very values
    of a model built for real with the same seed.

    Args:
        config: the shape.
        router, experts: make the router and the experts of one MoE layer; not called for a dense model.
        dispatcher: shared by the MoE layers; None for one process.
        checkpointing: none, full or selective, as described at `Block`.
        seed: of the initial values.
        layers: the consecutive layers, counting from 0, that this part holds; None for all. The embedding is where the
            first layer is, norm and head are where the last one is.
        meshes: this rank's place in the layout, for which the model is built. Forward always gets whole sequences; the
            model cuts them over cp and tp ranks, and expects its weights to be cut by `tensor_styles`.
        context_attention: how queries reach the keys of other cp ranks: gather (`parallel.context.attention`), ring
            (`parallel.context.ring`).
        activation_offload: keep what the backward pass needs in the memory of the CPU (`moe.offload`).

    Raises: ConfigError for tied embeddings in a model of several parts, or what tp cannot cut.
    """

    def __init__(
        self,
        config: ModelConfig,
        router: Callable[[], Router] | None = None,
        experts: Callable[[], Experts | AdapterExperts] | None = None,
        dispatcher: Dispatcher | None = None,
        checkpointing: str = "none",
        seed: int = 0,
        layers: Sequence[int] | None = None,
        meshes: Meshes = ONE_PROCESS,
        context_attention: str = "gather",
        activation_offload: bool = False,
    ) -> None:
        super().__init__()
        if checkpointing not in CHECKPOINTING:
            raise ConfigError(
                f"trainer.activation_checkpointing={checkpointing!r} is unknown, allowed: {', '.join(CHECKPOINTING)}"
            )
        if context_attention not in CONTEXT_ATTENTION:
            raise ConfigError(
                f"trainer.context_attention={context_attention!r} is unknown, allowed: {', '.join(CONTEXT_ATTENTION)}"
            )
        check_tensor_parallel(config, meshes.layout.tp)
        self.config = config
        self.meshes = meshes
        self.context_attention = CONTEXT_ATTENTION[context_attention]
        self.activation_offload = activation_offload
        self.layers = tuple(range(config.layers) if layers is None else layers)
        self.is_first, self.is_last = 0 in self.layers, config.layers - 1 in self.layers
        if config.tie_embeddings and not (self.is_first and self.is_last):
            raise ConfigError("model.tie_embeddings=true with layout.pp above 1, allowed: false, or layout.pp=1")
        self.embedding = nn.Embedding(config.vocab_size, config.width) if self.is_first else None
        self.blocks = nn.ModuleDict()
        for layer in self.layers:
            self.blocks[str(layer)] = Block(
                config.width,
                make_attention(config, layer, self._tp_group),
                make_mlp(config, layer, router, experts, dispatcher, self._tp_group),
                config.norm_eps,
                checkpointing,
            )
        self.norm = RMSNorm(config.width, config.norm_eps) if self.is_last else None
        has_head = self.is_last and not config.tie_embeddings
        self.head = nn.Linear(config.width, config.vocab_size, bias=False) if has_head else None
        self.rotary = RotaryTable(config.turned_width, config.rope_theta, config.max_positions, config.rope_scaling)
        freeze(self, config.frozen)
        if not next(self.parameters()).is_meta:
            self.reset_parameters(seed)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: StepContext = ALONE,
        cache: KeyValueCache | None = None,
        received: Tensor | None = None,
    ) -> Tensor:
        """The summed cross-entropy where labels are given, else the logits; of a part but the last, its hidden state.

        Args:
            tokens: (B, S) int64; every part gets them.
            labels: (B, S) int64, what each position should predict; -100 where nothing.
            cu_seqlens: (n + 1,) int32 on the CPU, document boundaries over the flattened B * S tokens, each row start
                among them; None for one document a row.
            context: what the MoE layers must know about the optimizer step.
            cache: keys and values of earlier tokens, which these tokens follow; appended to.
            received: what the previous part returned; None for the first.

        Returns: () float32, the sum over labels other than -100, without auxiliary losses; or (B, S, V); or hidden.
            Under cp the sum over this rank's labels; under tp the same on all tp ranks.
        Raises: ConfigError if the sequence is longer than model.max_positions.
        """
        hidden = self.hidden(tokens, cu_seqlens, context, cache, received)
        if not self.is_last:
            return hidden
        if labels is None:
            return self.logits(hidden)
        labels = self._own(labels, 1)
        if self._tp_group is not None:
            return vocabulary.parallel_linear_cross_entropy(hidden, self.head_weight, labels, self._tp_group)
        return linear_cross_entropy(hidden.flatten(0, 1), self.head_weight, labels.flatten())

    def hidden(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        context: StepContext = ALONE,
        cache: KeyValueCache | None = None,
        received: Tensor | None = None,
    ) -> Tensor:
        """The normed output of the last block, from which the head predicts; of a part but the last, of its last block.

        Shapes: (B, S) -> (B, S / (CP * TP), D).

        Rotary positions count along the row, also where it holds several documents: only differences of positions
        matter to attention.
        """
        rows, length = tokens.shape
        layout = self.meshes.layout
        check_length(length, layout.cp, layout.tp)
        start = 0 if cache is None else cache.length
        if start + length > self.config.max_positions:
            raise ConfigError(
                f"a sequence of {start + length} tokens is longer than model.max_positions={self.config.max_positions}"
            )
        visible = self._visible(cu_seqlens, rows, length, tokens.device)
        rotation = self.rotary(start, length, tokens.device)
        rotation = Rotation(self._own(rotation.cos, 0), self._own(rotation.sin, 0))
        context = replace(context, num_sequences=rows, sequence_group=self.meshes.sequence_group, cp=layout.cp)
        x = received if self.embedding is None else self._embed(self._own(tokens, 1))
        assert x is not None  # a part without embedding gets what the part before it returned
        with offloaded() if self.activation_offload and torch.is_grad_enabled() else contextlib.nullcontext():
            for layer, block in zip(self.layers, self.blocks.values()):
                own_cache = None if cache is None else cache.layers[layer]
                x = block(x, rotation, visible[self.config.window_of(layer)], context, own_cache)
        return x if self.norm is None else self.norm(x)

    def hidden_shape(self, tokens: Tensor) -> tuple[int, int, int]:
        """The shape of what one part hands to the next for these tokens."""
        rows, length = tokens.shape
        return rows, length // (self.meshes.layout.cp * self.meshes.layout.tp), self.config.width

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V). Raises: ConfigError where vocabulary or sequence are cut."""
        if self.meshes.sequence_group is not None:
            raise ConfigError("layout.tp or layout.cp above 1 has no whole logits, allowed: 1 each, or a loss")
        return nn.functional.linear(hidden, self.head_weight)

    @property
    def _tp_group(self) -> dist.ProcessGroup | None:
        return None if self.meshes.tp is None else self.meshes.tp.get_group()

    def _own(self, sequences: Tensor, dim: int) -> Tensor:
        """This cp rank's part of whole sequences."""
        return own_part(sequences, dim, self.meshes.layout.cp, self.meshes.coordinates.cp)

    def _embed(self, tokens: Tensor) -> Tensor:
        assert self.embedding is not None  # only the first part embeds
        if self._tp_group is None:
            return self.embedding(tokens)
        return vocabulary.embed(tokens, self.embedding.weight, self._tp_group)

    def _visible(
        self, cu_seqlens: Tensor | None, rows: int, length: int, device: torch.device
    ) -> dict[int | None, Visible]:
        """What a token may see, by the window of a layer: which keys a cp rank needs depends on it."""
        windows = {self.config.window_of(layer) for layer in self.layers}
        if self.meshes.cp is None:
            return dict.fromkeys(windows, Documents.of(cu_seqlens, rows, length, device))
        group = self.meshes.cp.get_group()
        return {window: self.context_attention(cu_seqlens, rows, length, group, device, window) for window in windows}

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the head's matrix, or the embedding's where they are tied."""
        table = self.embedding if self.head is None else self.head
        assert table is not None  # only the last part predicts
        return table.weight

    def reset_parameters(self, seed: int = 0) -> None:
        """Fill parameters and buffers with the initial values of this seed (see `models.init`)."""
        initialise(self, self.config, seed)

    def sharding_units(self) -> list[nn.Module]:
        """The blocks in order: what a sharded engine gathers, and what is compiled, one at a time."""
        return list(self.blocks.values())

    def tensor_styles(self) -> dict[str, ParallelStyle]:
        """By module name, how tensor parallelism cuts the model; what is not named stays whole.

        Whole parameters see a part of the tokens on each tp rank, so their gradients are still to be summed over tp.
        """
        from ...parallel.tensor.styles import CutParameters

        tables = {"embedding": self.embedding, "head": self.head}
        styles: dict[str, ParallelStyle] = {
            name: CutParameters(weight=0) for name, table in tables.items() if table is not None
        }
        for name, module in self.blocks.named_modules(prefix="blocks"):
            if isinstance(module, (SelfAttention, MLP)):
                styles |= {f"{name}.{child}" if child else name: cut for child, cut in module.tensor_styles().items()}
        return styles

    def moe_layers(self) -> list[tuple[int, MoELayer]]:
        """The MoE layers with their layer numbers."""
        blocks = zip(self.layers, self.blocks.values())
        return [(layer, block.mlp) for layer, block in blocks if isinstance(block.mlp, MoELayer)]
