"""The shape of a decoder-only transformer, checked."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels import ConfigError
from ...kernels.activations import check_activation
from ..blocks.latent_attention import LatentAttention
from ..blocks.rope import RopeScaling

QK_NORMS = ("none", "head", "projection")


@dataclass(frozen=True)
class ModelConfig:
    """What the `model` group of a config holds; serves Llama, Mixtral, Qwen, OLMoE, DeepSeek, GLM-4 and GPT-OSS.

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
        attention_bias: biases on the query, key and value projections; of latent attention, on those to the latents.
        sliding_window: tokens that a token sees, itself included; null for the whole document.
        window_layers: the layers, counting from 0, that have the sliding window; null for all.
        norm_eps: of every RMSNorm.
        tie_embeddings: the head is the embedding.
        init_std: standard deviation of initial matrices; null for 1 / sqrt(fan-in).
        rotary_width: channels of a head that turn, the first ones; null for all (GLM-4-MoE turns half).
        attention_output_bias: a bias on the output projection.
        attention_sinks: a learned logit per head in the denominator of its softmax (GPT-OSS).
        latent_attention: keys and values made from a small latent (DeepSeek-V2), whose widths it states; null for
            grouped queries, of which kv_heads, head_width, qk_norm and rotary_width speak.
        frozen: parameters that are not trained, by patterns of their names: blocks.*.attention.*, embedding.*. They get
            no gradient, no optimizer state and no decay; buffers, such as the expert bias, are not parameters.

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
    frozen: tuple[str, ...] = ()
    window_layers: tuple[int, ...] | None = None
    rotary_width: int | None = None
    attention_output_bias: bool = False
    attention_sinks: bool = False
    latent_attention: LatentAttention | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "width", "heads", "moe_every", "max_positions"):
            self._at_least(name, 1)
        for name in ("num_experts", "first_k_dense"):
            self._at_least(name, 0)
        for name in (
            *("kv_heads", "head_width", "ffn_width", "expert_width", "shared_expert_width"),
            *("sliding_window", "rotary_width"),
        ):
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
        """W: the given width of a query head, or width / heads."""
        if self.latent_attention is not None:
            return self.latent_attention.query_width
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def num_kv_heads(self) -> int:
        """G: the given number of key-value heads, or one for each query head."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def turned_width(self) -> int:
        """Channels of a head that turn with the position."""
        if self.latent_attention is not None:
            return self.latent_attention.rope_width
        return self.head_size if self.rotary_width is None else self.rotary_width

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token sees in that layer, counting from 0; None for the whole document."""
        return self.sliding_window if self.window_layers is None or layer in self.window_layers else None

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
        if self.latent_attention is not None:
            self._check_latent()
        elif self.head_width is None and self.width % self.heads:
            raise ConfigError(
                f"model.heads={self.heads} does not divide model.width={self.width}, allowed: a divisor, or give "
                "model.head_width"
            )
        if self.rotary_width is not None and (self.rotary_width % 2 or self.rotary_width > self.head_size):
            raise ConfigError(
                f"model.rotary_width={self.rotary_width} is out of range, allowed: an even number up to "
                f"model.head_width={self.head_size}"
            )
        if self.turned_width % 2:
            raise ConfigError(f"model.head_width={self.head_size} is odd, allowed: an even number (RoPE turns pairs)")
        if self.heads % self.num_kv_heads:
            raise ConfigError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}, allowed: a divisor"
            )

    def _check_latent(self) -> None:
        """Fields that speak of grouped queries must be at their defaults, or say what is so anyway."""
        plain = {"kv_heads": (None, self.heads), "head_width": (None,), "rotary_width": (None,), "qk_norm": ("none",)}
        for name, allowed in {**plain, "attention_sinks": (False,)}.items():
            value = getattr(self, name)
            if value not in allowed:
                shown = "null" if allowed[0] is None else str(allowed[0]).lower()
                raise ConfigError(f"model.{name}={value} with model.latent_attention, allowed: {shown}")

    def _check_layers(self) -> None:
        for name in ("moe_layers", "window_layers"):
            layers = getattr(self, name)
            wrong = [layer for layer in layers or () if not 0 <= layer < self.layers]
            if wrong:
                raise ConfigError(
                    f"model.{name}={list(layers)} names layer {wrong[0]}, allowed: 0 to {self.layers - 1}"
                )
        if self.window_layers is not None and self.sliding_window is None:
            raise ConfigError(
                f"model.window_layers={list(self.window_layers)} without model.sliding_window, allowed: null"
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
