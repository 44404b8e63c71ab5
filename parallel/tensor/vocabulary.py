"""The vocabulary cut over tp ranks: token table, head and cross-entropy, of which each rank holds some rows.

A vocabulary of V tokens is cut as `torch.chunk` cuts it: ranks hold V / TP rows, rounded up, and the last ones fewer.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...kernels.cross_entropy import CHUNK_ELEMENTS, IGNORE, Normalised, chunked_cross_entropy
from ..shards import local_part
from .collectives import all_gather, gather_rows, scatter_rows, sequence_parts


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
    if torch.is_autocast_enabled(hidden.device.type):  # before it is gathered
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    vocabulary = weight.shape[0]
    return chunked_cross_entropy(
        gather_rows(hidden.flatten(0, 1), group),
        local_part(weight),
        sequence_parts(labels, group).flatten(),
        max(1, chunk_elements // _rows_per_rank(vocabulary, group)),
        partial(_normalise, _first_row(vocabulary, group), group),
    )


def _normalise(first_row: int, group: dist.ProcessGroup, logits: Tensor, labels: Tensor) -> Normalised:
    """Over the vocabulary of all ranks, of which this one has the logits from token `first_row` on."""
    rows = logits.shape[1]
    row = labels - first_row
    is_here = (row >= 0) & (row < rows) & (labels != IGNORE)
    column = torch.where(is_here, row, 0)
    figures = logits.new_zeros(2, logits.shape[0])
    figures[0] = logits.logsumexp(-1)
    if rows > 0:
        figures[1] = logits.gather(-1, column.unsqueeze(-1)).squeeze(-1) * is_here
    everyone = all_gather(figures, group)
    return Normalised(everyone[0::2].logsumexp(0), everyone[1::2].sum(0), column, is_here)


def _rows_per_rank(vocabulary: int, group: dist.ProcessGroup) -> int:
    return -(-vocabulary // dist.get_world_size(group))


def _first_row(vocabulary: int, group: dist.ProcessGroup) -> int:
    return min(dist.get_rank(group) * _rows_per_rank(vocabulary, group), vocabulary)
