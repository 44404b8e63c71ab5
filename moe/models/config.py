"""The shape of a decoder-only transformer, checked."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels import ConfigError
from ...kernels.activations import check_activation
from ..blocks.rope import RopeScaling

QK_NORMS = ("none", "head", "projection")


@dataclass(frozen=True)
class ModelConfig:
    """What the `model` group of a config holds; serves the Llama, Mixtral, Qwen and OLMoE families.

    Attributes:
        vocab_size: V; null in a config file takes it from the tokenizer.
        layers, width: number of blocks; D.
        heads, kv_heads, head_width: query heads, key-value heads (null: as many), their width (null: width / heads).
        ffn_width: hidden width of dense MLPs; needed where a layer is dense.
        expert_width: hidden width F of one expert; needed where a layer is MoE.
        num_experts: E; 0 or 1 for a dense model.
        first_k_dense, moe_every: of the layers from first_k_dense on, each moe_every-th one is a MoE layer: layer i
            if (i + 1) is a multiple.
        moe_layers: explicit list of MoE layers, counting from 0, instead of the two above.
        shared_expert_width: hidden width of an MLP that every token passes besides its experts; null for none.
        shared_expert_gate: scale its output by a sigmoid gate, as Qwen2-MoE.
        activation: of dense MLPs and shared experts (that of experts is `experts.activation`).
        max_positions: longest sequence.
        rope_theta, rope_scaling: base of the rotary frequencies; a RopeScaling or null.
        qk_norm: none, head (as Qwen3) or projection (as OLMoE).
        attention_bias: biases on the query, key and value projections.
        sliding_window: tokens that a token sees, itself included; null for the whole document.
        norm_eps: of every RMSNorm.
        tie_embeddings: the head is the embedding.
        init_std: standard deviation of initial matrices; null for 1 / sqrt(fan-in).

    Raises: ConfigError that names the field, its value and what is allowed.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    head_width: int | None = None
    ffn_width: int | None = None
    expert_width: int | None = None
    num_experts: int = 0
    first_k_dense: int = 0
    moe_every: int = 1
    moe_layers: tuple[int, ...] | None = None
    shared_expert_width: int | None = None
    shared_expert_gate: bool = False
    activation: str = "swiglu"
    max_positions: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: str = "none"
    attention_bias: bool = False
    sliding_window: int | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "width", "heads", "moe_every", "max_positions"):
            self._at_least(name, 1)
        for name in ("num_experts", "first_k_dense"):
            self._at_least(name, 0)
        for name in ("kv_heads", "head_width", "ffn_width", "expert_width", "shared_expert_width", "sliding_window"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        check_activation(self.activation, "model.activation")
        self._check_heads()
        self._check_layers()
        if self.qk_norm not in QK_NORMS:
            raise ConfigError(f"model.qk_norm={self.qk_norm!r} is unknown, allowed: {', '.join(QK_NORMS)}")
        for name in ("rope_theta", "norm_eps", "init_std"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"model.{name}={value} is out of range, allowed: above 0")

    @property
    def head_size(self) -> int:
        """W: the given width of a head, or width / heads."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def num_kv_heads(self) -> int:
        """G: the given number of key-value heads, or one for each query head."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def is_moe(self, layer: int) -> bool:
        """Whether that layer, counting from 0, has experts."""
        if self.num_experts <= 1:
            return False
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return layer >= self.first_k_dense and (layer + 1) % self.moe_every == 0

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            raise ConfigError(f"model.{name}={value} is too small, allowed: {least} or more")

    def _check_heads(self) -> None:
        if self.head_width is None and self.width % self.heads:
            raise ConfigError(
                f"model.heads={self.heads} does not divide model.width={self.width}, allowed: a divisor, or give "
                "model.head_width"
            )
        if self.head_size % 2:
            raise ConfigError(f"model.head_width={self.head_size} is odd, allowed: an even number (RoPE turns pairs)")
        if self.heads % self.num_kv_heads:
            raise ConfigError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}, allowed: a divisor"
            )

    def _check_layers(self) -> None:
        if self.moe_layers is not None:
            wrong = [layer for layer in self.moe_layers if not 0 <= layer < self.layers]
            if wrong:
                raise ConfigError(
                    f"model.moe_layers={list(self.moe_layers)} names layer {wrong[0]}, allowed: 0 to {self.layers - 1}"
                )
        moe = [self.is_moe(layer) for layer in range(self.layers)]
        if any(moe) and self.expert_width is None:
            raise ConfigError(f"model.expert_width=null with model.num_experts={self.num_experts}, allowed: 1 or more")
        if not all(moe) and self.ffn_width is None:
            raise ConfigError(f"model.ffn_width=null, but layer {moe.index(False)} is dense, allowed: 1 or more")
        if self.num_experts > 1 and not any(moe):
            raise ConfigError(
                f"model.num_experts={self.num_experts}, but no layer is a MoE layer with "
                f"model.first_k_dense={self.first_k_dense}, model.moe_every={self.moe_every}, "
                f"model.moe_layers={None if self.moe_layers is None else list(self.moe_layers)}; allowed: at least "
                "one, or model.num_experts=0"
            )
        if self.shared_expert_gate and self.shared_expert_width is None:
            raise ConfigError("model.shared_expert_gate=true without model.shared_expert_width, allowed: false")


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Raises: ConfigError for a size that tp ranks cannot share evenly. The vocabulary need not be even."""
    for name in ("heads", "num_kv_heads", "ffn_width", "shared_expert_width"):
        size = getattr(config, name)
        if size is not None and size % tp:
            field = name.removeprefix("num_")
            raise ConfigError(f"layout.tp={tp} does not divide model.{field}={size}, allowed: a divisor of it")
