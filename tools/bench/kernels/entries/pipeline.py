"""What a user writes with torch alone: sort, gather, `F.grouped_mm` twice, `index_add`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .....kernels.torch_backend import fits_grouped_mm
from ..case import Case, Layer, Refused, leaf


def build(case: Case) -> Layer:
    """Autograd writes the backward."""
    shape = case.shape
    if not fits_grouped_mm(case.dtype, shape.width, shape.expert_width):
        raise Refused("F.grouped_mm needs rows of a multiple of 16 bytes")
    x, w_in, w_out, weights = leaf(case.x), leaf(case.w_in), leaf(case.w_out), leaf(case.weights)
    numbers = torch.arange(shape.experts, device=case.device)

    def forward() -> Tensor:
        expert, order = case.experts.flatten().sort()
        token = order // shape.top_k
        ends = torch.searchsorted(expert, numbers, right=True).to(torch.int32)
        gate, up = F.grouped_mm(x[token], w_in.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, w_out.transpose(1, 2), offs=ends)
        y = y * weights.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x).index_add(0, token, y)

    return Layer(forward, x, case.grad, (w_in, w_out), weights)
