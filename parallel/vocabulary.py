"""The vocabulary cut over tp ranks: token table, head and cross-entropy, of which each rank holds some rows.

A vocabulary of V tokens is cut as `torch.chunk` cuts it: ranks hold V / TP rows, rounded up, and the last ones fewer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.cross_entropy import CHUNK_ELEMENTS, IGNORE
from .shards import local_part
from .tensor import all_gather, gather_rows, scatter_rows, sequence_parts


def embed(tokens: Tensor, table: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Look tokens up, each on the rank that holds it, and leave each rank its part of the sequences.

    Args:
        tokens: (B, S), the same on all ranks of the group.
        table: (V, D), cut over the group.

    Returns: (B, S / TP, D), consecutive tokens.
    """
    rows = local_part(table)
    row = sequence_parts(tokens, group) - _first_row(table.shape[0], group)
    is_here = (row >= 0) & (row < rows.shape[0])
    if rows.shape[0] == 0:  # a vocabulary of fewer tokens than ranks; the gradient has to flow all the same
        rows = F.pad(rows, (0, 0, 0, 1))
    partial = F.embedding(torch.where(is_here, row, 0), rows) * is_here.unsqueeze(-1)
    return scatter_rows(partial, group).squeeze(0)


def parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """`kernels.cross_entropy.linear_cross_entropy` over a cut vocabulary and cut sequences ("loss parallel").

    Of each chunk of tokens a rank makes the logits of its part of the vocabulary, and their gradients at once. Two
    numbers per token and rank tell the others all they need: the log-sum-exp of its logits, and the logit of the label
    if the rank has it (as Megatron-LM, 1909.08053, section 3, which reduces a maximum and a sum instead).

    Args:
        hidden: (B, S / TP, D), this rank's part of the sequences.
        weight: (V, D) of the head, cut over the group.
        labels: (B, S), the same on all ranks of the group; -100 does not count.
        chunk_elements: most logits that a rank holds at a time.

    Returns: () float32 sum over all labels, the same on all ranks of the group (float64 for float64 inputs).
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    vocabulary = weight.shape[0]
    chunk = max(1, chunk_elements // _rows_per_rank(vocabulary, group))
    with torch.autocast(device, enabled=False):
        return _ParallelCrossEntropy.apply(
            gather_rows(hidden.flatten(0, 1), group),
            local_part(weight),
            sequence_parts(labels, group).flatten(),
            _first_row(vocabulary, group),
            group,
            chunk,
            torch.is_grad_enabled(),
        )


class _ParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        first_row: int,
        group: dist.ProcessGroup,
        chunk: int,
        learning: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = (learning and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        head = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            grad_rows = None if grad_hidden is None else grad_hidden[rows]
            loss += _chunk(hidden[rows], head, labels[rows], first_row, group, grad_rows, grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunk(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    first_row: int,
    group: dist.ProcessGroup,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """The summed loss of some tokens; writes this rank's share of their gradient, adds that of its part of the head.

    d loss / d logits = softmax - onehot(label), of which a rank has its columns.
    """
    logits = torch.mm(hidden, head.T).to(torch.promote_types(hidden.dtype, torch.float32))
    counts = labels != IGNORE
    row = labels - first_row
    is_here = (row >= 0) & (row < head.shape[0]) & counts
    target = torch.where(is_here, row, 0).unsqueeze(-1)
    figures = logits.new_zeros(2, hidden.shape[0])
    figures[0] = logits.logsumexp(-1)
    if head.shape[0] > 0:
        figures[1] = logits.gather(-1, target).squeeze(-1) * is_here
    everyone = all_gather(figures, group)
    log_total, label_logit = everyone[0::2].logsumexp(0), everyone[1::2].sum(0)
    loss = (log_total - label_logit).masked_fill(~counts, 0.0).sum()
    if grad_hidden is None and grad_weight is None:
        return loss
    grad = logits.sub_(log_total.unsqueeze(-1)).exp_()
    if head.shape[0] > 0:
        grad.scatter_add_(-1, target, -is_here.to(grad.dtype).unsqueeze(-1))
    grad = grad.masked_fill_(~counts.unsqueeze(-1), 0.0).to(hidden.dtype)
    if grad_hidden is not None:
        torch.mm(grad, head, out=grad_hidden)
    if grad_weight is not None:
        if grad_weight.dtype == hidden.dtype:
            grad_weight.addmm_(grad.T, hidden)
        else:
            grad_weight += torch.mm(grad.T, hidden)
    return loss


def _rows_per_rank(vocabulary: int, group: dist.ProcessGroup) -> int:
    return -(-vocabulary // dist.get_world_size(group))


def _first_row(vocabulary: int, group: dist.ProcessGroup) -> int:
    return min(dist.get_rank(group) * _rows_per_rank(vocabulary, group), vocabulary)
