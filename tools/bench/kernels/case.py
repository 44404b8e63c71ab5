"""The inputs of one measurement, equal for all that take part, and what taking part means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ZIPF_EXPONENT = 1.5


class Refused(Exception):
    """An entry does not serve this device, dtype or shape; the message says why."""


@dataclass(frozen=True)
class Case:
    """One shape in one dtype.

    Attributes:
        x, grad: (T, D), input and gradient of the output.
        w_in: (E, 2F, D), gate rows first; w_out: (E, D, F).
        experts: (T, K) int64; weights: (T, K) float32, each row sums to 1.
    """

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    x: Tensor
    grad: Tensor
    w_in: Tensor
    w_out: Tensor
    experts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Layer:
    """A layer ready to be called.

    Attributes:
        forward: computes the output, with a graph if gradients are enabled.
        x: its leaf for the input; the output, and so `grad`, has as many rows.
        grad: gradient of the output.
        parameters: leaves that hold weights; what is saved of them costs no memory.
        weights: leaf for the combine weights, None for a dense layer.
    """

    forward: Callable[[], Tensor]
    x: Tensor
    grad: Tensor
    parameters: Sequence[Tensor]
    weights: Tensor | None = None

    def clear(self) -> None:
        """Forget gradients, as `zero_grad` does between steps."""
        for leaf in (self.x, self.weights, *self.parameters):
            if leaf is not None:
                leaf.grad = None


def leaf(t: Tensor) -> Tensor:
    """The same memory as something that gets a gradient."""
    return t.detach().requires_grad_()


def make_case(shape: Shape, dtype: torch.dtype, device: torch.device, routing: str, seed: int) -> Case:
    """Draw inputs, weights and routing; the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype).mul_(scale)

    T, D, F, E, K = shape.tokens, shape.width, shape.expert_width, shape.experts, shape.top_k
    logits = torch.randn(T, K, generator=generator, device=device)
    return Case(
        shape=shape,
        dtype=dtype,
        device=device,
        x=randn(T, D),
        grad=randn(T, D),
        w_in=randn(E, 2 * F, D, scale=D**-0.5),
        w_out=randn(E, D, F, scale=F**-0.5),
        experts=draw_experts(routing, T, E, K, generator),
        weights=logits.softmax(-1),
    )


def draw_experts(routing: str, tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """K distinct experts for each token, (T, K).

    balanced: every expert as often as any other, within one. uniform: drawn at random. zipf: drawn with probabilities
    that fall with the expert's rank to the power of 1.5, the skew of a router without balancing.
    """
    device = generator.device
    if routing == "balanced":
        order = torch.randperm(tokens, generator=generator, device=device)
        names = torch.randperm(experts, generator=generator, device=device)
        return names[(order[:, None] * top_k + torch.arange(top_k, device=device)) % experts]
    score = -torch.empty(tokens, experts, device=device).exponential_(generator=generator).log()  # Gumbel noise
    if routing == "zipf":
        rank = torch.arange(1, experts + 1, device=device)
        score -= ZIPF_EXPONENT * rank.log()
    return score.topk(top_k, dim=-1).indices  # the top k of log-probabilities plus Gumbel noise: without replacement
