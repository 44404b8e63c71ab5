"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels import ConfigError
from ...parallel.shards import local_part
from ...parallel.tensor.collectives import gather_sequence
from .attention import LayerCache, SelfAttention, Visible
from .linear import Linear
from .norm import RMSNorm
from .rope import Rotation

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


@dataclass(frozen=True)
class LatentAttention:
    """The widths of latent attention.

    Attributes:
        kv_rank: width of the latent from which all heads' keys and values are made (kv_lora_rank).
        nope_width: channels of a query or key head that do not turn (qk_nope_head_dim).
        rope_width: channels that turn with the position; those of the keys are shared by all heads (qk_rope_head_dim).
        value_width: width of a value head (v_head_dim).
        q_rank: width of the latent from which queries are made (q_lora_rank); null to make them from the input, as
            DeepSeek-V2-Lite.
        interleaved: channels 2i and 2i + 1 turn together, as DeepSeek stores them; false for i and i + rope_width / 2.
        norm_eps: of the norms of the latents.

    Raises: ConfigError for a width that is impossible.
    """

    kv_rank: int
    nope_width: int
    rope_width: int
    value_width: int
    q_rank: int | None = None
    interleaved: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("kv_rank", "nope_width", "rope_width", "value_width", "q_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.latent_attention.{name}={value} is too small, allowed: 1 or more")
        if self.rope_width % 2:
            raise ConfigError(f"model.latent_attention.rope_width={self.rope_width} is odd, allowed: an even number")
        if self.value_width > self.query_width:
            raise ConfigError(
                f"model.latent_attention.value_width={self.value_width} is larger than nope_width + rope_width = "
                f"{self.query_width}, allowed: at most that"
            )
        if not self.norm_eps > 0:
            raise ConfigError(f"model.latent_attention.norm_eps={self.norm_eps} is out of range, allowed: above 0")

    @property
    def query_width(self) -> int:
        """Of a query or key head."""
        return self.nope_width + self.rope_width


class MultiHeadLatentAttention(SelfAttention):
    """Keys and values of all heads are made from one latent of a token, which is all that a cache keeps.

    A head's query and key have channels that do not turn, made from latents, and channels that turn; the latter are
    one key for all heads, made from the input. For one new token the matrices that expand latents to keys and values
    are moved to the queries and the outputs, so that past latents are never expanded (section 2.1.2).

    Args:
        width: D.
        heads: H.
        settings: the other widths.
        bias: biases on the projections to the latents.
        output_bias: one on the output projection.
        logit_factor: on the logits, besides 1 / sqrt(nope_width + rope_width) (YaRN in DeepSeek's form).
        window: a token sees itself and the window - 1 tokens before it; None for the whole document.
        group: tp ranks over which the heads are cut; None for all of them here. Each computes the latents of its part
            of the sequence, and the latents are gathered.

    Parameters: wq_down (Rq, D) and q_norm if there is a q_rank; wq (H W, Rq or D); wkv_down (R + rope_width, D), the
        latent first; kv_norm; wkv (H (nope_width + value_width), R), each head's key first; wo (D, H value_width).
    Shapes: (B, S, D) -> (B, S, D), S cut over context and tensor parallel ranks.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        settings: LatentAttention,
        bias: bool = False,
        output_bias: bool = False,
        logit_factor: float = 1.0,
        window: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(window, group)
        self.settings = settings
        self.logit_factor = logit_factor
        rank, q_rank = settings.kv_rank, settings.q_rank
        self.wq_down = None if q_rank is None else Linear(width, q_rank, bias=bias)
        self.q_norm = None if q_rank is None else RMSNorm(q_rank, settings.norm_eps)
        self.wq = Linear(width if q_rank is None else q_rank, heads * settings.query_width, bias=False)
        self.wkv_down = Linear(width, rank + settings.rope_width, bias=bias)
        self.kv_norm = RMSNorm(rank, settings.norm_eps)
        self.wkv = Linear(rank, heads * (settings.nope_width + settings.value_width), bias=False)
        self.wo = Linear(heads * settings.value_width, width, bias=output_bias)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        visible: Visible = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        q_source, latent, k_turned = self._sources(x)
        q = self.wq(q_source).unflatten(-1, (-1, self.settings.query_width))
        q_straight, q_turned = q.split((self.settings.nope_width, self.settings.rope_width), -1)
        q_turned, k_turned = self._turn(q_turned, rotation), self._turn(k_turned, rotation)
        if self.logit_factor != 1.0:
            q_straight, q_turned = q_straight * self.logit_factor, q_turned * self.logit_factor
        if cache is not None:
            latent, k_turned = cache.append(latent, k_turned)
            if q.shape[1] == 1:
                return self.project(self._over_latents(q_straight, q_turned, latent, k_turned))
        k_straight, v = self._heads(self.wkv(latent), -1).split(
            (self.settings.nope_width, self.settings.value_width), -1
        )
        k = torch.cat((k_straight, k_turned.expand(*k_straight.shape[:-1], -1)), -1)
        return self.project(self.attend(torch.cat((q_straight, q_turned), -1), k, v, visible))

    def tensor_styles(self) -> dict[str, ParallelStyle]:
        from ...parallel.tensor.styles import cut_inputs, cut_outputs

        return {"wq": cut_outputs(), "wkv": cut_outputs(), "wo": cut_inputs()}

    def _sources(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What queries are made from (B, S, Rq or D), latents (B, S, R), the shared keys (B, S, 1, rope_width)."""
        q_source = x if self.wq_down is None or self.q_norm is None else self.q_norm(self.wq_down(x))
        latent, shared = self.wkv_down(x).split((self.settings.kv_rank, self.settings.rope_width), -1)
        latent = self.kv_norm(latent)
        if self.group is not None:
            sources = (q_source, latent, shared)
            gathered = gather_sequence(torch.cat(sources, -1), self.group)  # one message
            q_source, latent, shared = gathered.split([source.shape[-1] for source in sources], -1)
        return q_source, latent, shared.unsqueeze(-2)

    def _turn(self, x: Tensor, rotation: Rotation) -> Tensor:
        """(B, S, heads, rope_width); the channels of queries and keys come out in the same order."""
        if self.settings.interleaved:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotation(x)

    def _over_latents(self, q_straight: Tensor, q_turned: Tensor, latent: Tensor, k_turned: Tensor) -> Tensor:
        """Attention of one new token: all heads' queries to the latents of P tokens, as one key-value head.

        q . (W_k c) = (W_k^T q) . c, and the sum over p_j W_v c_j is W_v times the sum over p_j c_j.
        """
        own = self._heads(local_part(self.wkv.weight), 0)
        w_k, w_v = own.split((self.settings.nope_width, self.settings.value_width), 1)
        q = torch.cat((torch.einsum("bshn,hnr->bshr", q_straight, w_k.to(q_straight.dtype)), q_turned), -1)
        k = torch.cat((latent.unsqueeze(-2), k_turned), -1)
        q = q * (k.shape[-1] / self.settings.query_width) ** 0.5  # attention divides by the root of this width
        mixed = self.attend(q, k, latent.unsqueeze(-2), None)
        return torch.einsum("bshr,hvr->bshv", mixed, w_v.to(mixed.dtype))

    def _heads(self, x: Tensor, dim: int) -> Tensor:
        """Keys and values, or the rows that make them, head by head."""
        return x.unflatten(dim, (-1, self.settings.nope_width + self.settings.value_width))
