"""Experts that share one dense MLP and differ in small adapters on its output (PESC, 2401.02731)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels import ConfigError, Routing
from ..kernels.grouped_mm import sum_by_token
from ..parallel.shards import local_range
from .blocks.mlp import MLP
from .experts import Experts


class AdapterExperts(nn.Module):
    """One dense MLP for all tokens, and an adapter per expert: `y = sum_e w_e (u + A_e(u))` with `u = MLP(x)`.

    `A_e(u) = alpha * gelu(u V_e^T) U_e^T`, without the dropout of the paper. The U are zero at the start, so a layer
    whose combine weights sum to one then is the dense MLP (section 3.2).

    The MLP is the same for every expert, so it runs once per token where the token is (`before`), and u travels to the
    ranks of the experts instead of x. There each assignment that arrives adds w_e u besides its adapter. So
    what a dispatcher drops is missing from both, and the sum over ranks is right for any dispatcher.

    Args:
        num_experts: E.
        width: D.
        expert_width: F of the MLP.
        adapter_width: A, which expert tensor parallelism cuts.
        alpha: factor of the adapters.
        activation: of the MLP; that of the adapters is gelu.
        train_ffn: train the MLP too; False keeps it as it is.
        backend, recompute: of the adapters, as at `Experts`.

    Parameters: ffn.* as at `MLP`; adapters.w_in (E, A, D), the V; adapters.w_out (E, D, A), the U.
    Shapes: `before`: (T, D) -> (T, D); then rows (R, D) of that and a routing over them -> (R, D).
    Raises: ConfigError for a size below 1, an alpha of 0, or what `Experts` refuses.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        expert_width: int,
        adapter_width: int = 64,
        alpha: float = 1.0,
        activation: str = "swiglu",
        train_ffn: bool = False,
        backend: str | None = None,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        if expert_width < 1:
            raise ConfigError(f"model.expert_width={expert_width} is too small, allowed: 1 or more")
        if adapter_width < 1:
            raise ConfigError(f"experts.adapter_width={adapter_width} is too small, allowed: 1 or more")
        if alpha == 0:
            raise ConfigError("experts.alpha=0 turns the adapters off, allowed: any other number")
        self.num_experts, self.expert_width = num_experts, adapter_width  # what is spread over the ranks
        self.activation, self.alpha = activation, alpha
        self.ffn = MLP(width, expert_width, activation)
        self.ffn.requires_grad_(train_ffn)
        self.adapters = Adapters(num_experts, width, adapter_width, alpha, backend, recompute)

    b_in = None  # no biases, for those who ask as of `Experts`

    @property
    def stacked(self) -> Experts:
        """The part whose parameters are stacked over the experts, which ep and etp cut."""
        return self.adapters

    def share(self, group: dist.ProcessGroup | None) -> None:
        """Tell what runs before the dispatch over which tp ranks it is cut."""
        self.ffn.group = group

    def before(self, hidden_TD: Tensor) -> Tensor:
        """What every token passes once, before it travels to its experts."""
        return self.ffn(hidden_TD)

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        return self.adapters(rows, routing)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Adapters(Experts):
    """The adapters: `sum_e w_e (u + alpha * gelu(u V_e^T) U_e^T)` of the rows u that arrived.

    Of adapters that are cut over etp ranks, the first slice adds w_e u.
    """

    def __init__(
        self, num_experts: int, width: int, adapter_width: int, alpha: float, backend: str | None, recompute: str
    ) -> None:
        super().__init__(num_experts, width, adapter_width, "gelu", backend, recompute=recompute)
        self.alpha = alpha

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.w_out)

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        scaled = routing if self.alpha == 1.0 else routing.with_weight(routing.weight * self.alpha)
        out = super().forward(rows, scaled)
        if local_range(self.w_out, 2).start > 0:
            return out
        return out + _WeighRows.apply(rows, routing.weight, routing)


class _WeighRows(torch.autograd.Function):
    """Each row times the sum of its combine weights: (R, D), zeros for rows that no expert takes.

    Assignments and rows beyond what the routing names are padding that may hold anything, so they are left out by
    selection and not by a weight of zero.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, routing: Routing) -> Tensor:
        sums = sum_by_token(weight[:, None], None, routing.assignment, routing.token_offsets)
        ctx.save_for_backward(rows, sums, routing.token, routing.token_offsets, routing.expert_offsets)
        taken = routing.token_offsets.diff()[:, None] > 0
        return torch.where(taken, rows * sums, 0.0).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, sums, token, token_offsets, expert_offsets = ctx.saved_tensors
        taken = token_offsets.diff()[:, None] > 0
        grad_rows = torch.where(taken, grad * sums, 0.0).to(rows.dtype)
        by_row = torch.where(taken, grad.to(sums.dtype) * rows, 0.0).sum(1)
        counts = torch.arange(token.numel(), device=token.device) < expert_offsets[-1]
        grad_weight = torch.nn.functional.pad(by_row, (0, 1))[torch.where(counts, token, by_row.numel())]
        return grad_rows, grad_weight, None
