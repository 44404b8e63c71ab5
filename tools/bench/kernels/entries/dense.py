"""The dense limits: the same FLOPs without routing."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..case import Case, Layer, leaf


def build_a(case: Case) -> Layer:
    """(a) A SwiGLU MLP of the experts' width over T x K rows that lie one after the other."""
    rows, grad = (t.repeat_interleave(case.shape.top_k, 0) for t in (case.x, case.grad))
    return _swiglu_mlp(rows, grad, case.w_in[0], case.w_out[0])


def build_b(case: Case) -> Layer:
    """(b) A SwiGLU MLP of K times the width over T rows: what one would train instead."""
    K, F_, D = case.shape.top_k, case.shape.expert_width, case.shape.width
    halves = case.w_in[:K].view(K, 2, F_, D).transpose(0, 1)  # the gates of all K experts, then their ups
    w_out = case.w_out[:K].transpose(0, 1).reshape(D, K * F_)
    return _swiglu_mlp(case.x, case.grad, halves.reshape(2 * K * F_, D), w_out)


def _swiglu_mlp(x: Tensor, grad: Tensor, w_in: Tensor, w_out: Tensor) -> Layer:
    x, w_in, w_out = leaf(x), leaf(w_in.contiguous()), leaf(w_out.contiguous())

    def forward() -> Tensor:
        gate, up = F.linear(x, w_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, w_out)

    return Layer(forward, x, grad, (w_in, w_out))
