"""A projection of which a rank may hold a slice."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...parallel.shards import local_part


class Linear(nn.Linear):
    """`nn.Linear` that computes with the slice of its weight that this tp rank holds, the whole one where it is whole.

    Shapes: (..., inputs) -> (..., outputs), whichever of the two is cut.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local_part(self.weight), None if self.bias is None else local_part(self.bias))
