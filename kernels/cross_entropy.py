"""Cross-entropy of a linear head, without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
CHUNK_ELEMENTS = 2**26  # logits held at a time: 256 MiB in float32


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """Sum over tokens of -log softmax(weight @ hidden)[label], the softmax in float32.

    Logits of (T, V) would be the largest tensor of a training step. They are made chunk by chunk, and each chunk's
    gradients at once, so that backward only scales them: exact, and no matrix product is done twice.

    Args:
        hidden: (T, D).
        weight: (V, D) of the head, any floating dtype; products run in hidden's dtype (or autocast's).
        labels: (T,) int64; tokens with label -100 do not count.
        chunk_elements: most logits held at a time.

    Returns: () float32 (float64 for float64 inputs).
    """
    return chunked_cross_entropy(hidden, weight, labels, max(1, chunk_elements // weight.shape[0]), _whole_vocabulary)


@dataclass(frozen=True)
class Normalised:
    """What the logits of some tokens (t, V) say about their labels.

    Attributes:
        log_total: (t,) log of the sum of exp(logit) over the whole vocabulary.
        label_logit: (t,) logit of the label; anything finite where the label does not count.
        column: (t,) of the logits that is the label's; 0 where there is none.
        is_here: (t,) whether there is one, and it counts.
    """

    log_total: Tensor
    label_logit: Tensor
    column: Tensor
    is_here: Tensor


def _whole_vocabulary(logits: Tensor, labels: Tensor) -> Normalised:
    counts = labels != IGNORE
    column = torch.where(counts, labels, 0)
    return Normalised(logits.logsumexp(-1), logits.gather(-1, column.unsqueeze(-1)).squeeze(-1), column, counts)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    normalise: Callable[[Tensor, Tensor], Normalised],
) -> Tensor:
    """The summed loss of hidden (T, D) over the rows of a head (V, D), `chunk` tokens at a time.

    Args:
        normalise: from logits (t, V) and labels (t,); where `weight` is a part of the head, it asks those who have the
            others. Gradients are then those of this part, and this part's share of hidden's.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, normalise, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        normalise: Callable[[Tensor, Tensor], Normalised],
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
            loss += _chunk(hidden[rows], head, labels[rows], normalise, grad_rows, grad_weight)
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
        return grad_hidden, grad_weight, None, None, None, None


def _chunk(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    normalise: Callable[[Tensor, Tensor], Normalised],
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """The summed loss of some tokens; writes their gradient of hidden and adds that of the head.

    d loss / d logits = softmax - onehot(label).
    """
    logits = torch.mm(hidden, head.T).to(torch.promote_types(hidden.dtype, torch.float32))
    ignored = labels == IGNORE
    found = normalise(logits, labels)
    loss = (found.log_total - found.label_logit).masked_fill(ignored, 0.0).sum()
    if grad_hidden is None and grad_weight is None:
        return loss
    grad = logits.sub_(found.log_total.unsqueeze(-1)).exp_()
    if head.shape[0] > 0:
        grad.scatter_add_(-1, found.column.unsqueeze(-1), -found.is_here.to(grad.dtype).unsqueeze(-1))
    grad = grad.masked_fill_(ignored.unsqueeze(-1), 0.0).to(hidden.dtype)
    if grad_hidden is not None:
        torch.mm(grad, head, out=grad_hidden)
    if grad_weight is not None:
        if grad_weight.dtype == hidden.dtype:
            grad_weight.addmm_(grad.T, hidden)
        else:
            grad_weight += torch.mm(grad.T, hidden)
    return loss
