"""The decoder-only transformer, dense or with experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from ...kernels import ConfigError
from ...kernels.attention import Documents
from ...kernels.cross_entropy import linear_cross_entropy
from ...parallel.dispatchers import Dispatcher
from ..blocks import MLP, Attention, Block, GatedMLP, KeyValueCache, RMSNorm, RotaryTable
from ..blocks.block import CHECKPOINTING
from ..context import ALONE, StepContext
from ..experts import Experts
from ..layer import MoELayer
from ..routers.base import Router
from .config import ModelConfig
from .init import initialise


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head.

    Built under `torch.device("meta")` it takes no memory: `to_empty` and `reset_parameters` then give the very values
    of a model built for real with the same seed.

    Args:
        config: the shape.
        router, experts: make the router and the experts of one MoE layer; not called for a dense model.
        dispatcher: shared by the MoE layers; None for one process.
        checkpointing: none, full or selective, as described at `Block`.
        seed: of the initial values.
    """

    def __init__(
        self,
        config: ModelConfig,
        router: Callable[[], Router] | None = None,
        experts: Callable[[], Experts] | None = None,
        dispatcher: Dispatcher | None = None,
        checkpointing: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if checkpointing not in CHECKPOINTING:
            raise ConfigError(
                f"trainer.activation_checkpointing={checkpointing!r} is unknown, allowed: {', '.join(CHECKPOINTING)}"
            )
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                self._make_attention(config),
                self._make_mlp(config, layer, router, experts, dispatcher),
                config.norm_eps,
                checkpointing,
            )
            for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.rotary = RotaryTable(config.head_size, config.rope_theta, config.max_positions, config.rope_scaling)
        if not self.embedding.weight.is_meta:
            self.reset_parameters(seed)

    @staticmethod
    def _make_attention(config: ModelConfig) -> Attention:
        return Attention(
            config.width,
            config.heads,
            config.num_kv_heads,
            config.head_size,
            config.qk_norm,
            config.attention_bias,
            config.sliding_window,
            config.norm_eps,
        )

    @staticmethod
    def _make_mlp(
        config: ModelConfig,
        layer: int,
        router: Callable[[], Router] | None,
        experts: Callable[[], Experts] | None,
        dispatcher: Dispatcher | None,
    ) -> nn.Module:
        if not config.is_moe(layer):
            assert config.ffn_width is not None  # the config has checked it
            return MLP(config.width, config.ffn_width, config.activation)
        if router is None or experts is None:
            raise ConfigError(f"layer {layer} is a MoE layer, but no router or experts were given")
        shared = None
        if config.shared_expert_width is not None:
            kind = GatedMLP if config.shared_expert_gate else MLP
            shared = kind(config.width, config.shared_expert_width, config.activation)
        return MoELayer(router(), experts(), shared, dispatcher, index=layer)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: StepContext = ALONE,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The summed cross-entropy where labels are given, else the logits.

        Args:
            tokens: (B, S) int64.
            labels: (B, S) int64, what each position should predict; -100 where nothing.
            cu_seqlens: (n + 1,) int32 on the CPU, document boundaries over the flattened B * S tokens, each row start
                among them; None for one document a row.
            context: what the MoE layers must know about the optimizer step.
            cache: keys and values of earlier tokens, which these tokens follow; appended to.

        Returns: () float32, the sum over labels other than -100, without auxiliary losses; or (B, S, V).
        Raises: ConfigError if the sequence is longer than model.max_positions.
        """
        hidden = self.hidden(tokens, cu_seqlens, context, cache)
        if labels is None:
            return self.logits(hidden)
        return linear_cross_entropy(hidden.flatten(0, 1), self.head_weight, labels.flatten())

    def hidden(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        context: StepContext = ALONE,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The normed output of the last block, from which the head predicts: (B, S) -> (B, S, D).

        Rotary positions count along the row, also where it holds several documents: only differences of positions
        matter to attention.
        """
        rows, length = tokens.shape
        start = 0 if cache is None else cache.length
        if start + length > self.config.max_positions:
            raise ConfigError(
                f"a sequence of {start + length} tokens is longer than model.max_positions={self.config.max_positions}"
            )
        documents = Documents.of(cu_seqlens, rows, length, tokens.device)
        rotation = self.rotary(start, length, tokens.device)
        context = replace(context, num_sequences=rows)
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, documents, context, None if cache is None else cache.layers[layer])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return nn.functional.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the head's matrix, or the embedding's where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def reset_parameters(self, seed: int = 0) -> None:
        """Fill parameters and buffers with the initial values of this seed (see `models.init`)."""
        initialise(self, self.config, seed)

    def sharding_units(self) -> list[nn.Module]:
        """The blocks in order: what a sharded engine gathers, and what is compiled, one at a time."""
        return list(self.blocks)

    def moe_layers(self) -> list[tuple[int, MoELayer]]:
        """The MoE layers with their layer numbers."""
        return [(layer, block.mlp) for layer, block in enumerate(self.blocks) if isinstance(block.mlp, MoELayer)]
