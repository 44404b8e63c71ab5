"""The order in which ranks hold the tokens of a sequence.

A sequence of S tokens is cut into 2 CP chunks, of which rank r holds chunks r and 2 CP - 1 - r ("zigzag"): under a
causal mask late queries cost more than early ones, and every rank then has as many pairs of query and key to compute
(2309.14509 and Llama 3, 2407.21783, section 3.3.2).

    CP = 2      sequence order   0 1 2 3
                rank order       0 3 | 1 2
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import ConfigError


def to_rank_order(sequences: Tensor, dim: int, cp: int) -> Tensor:
    """From sequence order to the parts of all ranks one after the other; (..., S, ...) -> (..., S, ...)."""
    chunks = sequences.chunk(2 * cp, dim)
    return torch.cat([chunk for rank in range(cp) for chunk in (chunks[rank], chunks[-1 - rank])], dim)


def to_sequence_order(parts: Tensor, dim: int, cp: int) -> Tensor:
    """Inverse of `to_rank_order`: what all ranks of a sequence group hold, gathered along `dim`, in sequence order.

    The group may also span tp ranks, which cut the part of a cp rank into consecutive pieces.
    """
    if cp == 1:
        return parts
    chunks = parts.chunk(2 * cp, dim)
    return torch.cat([*chunks[0::2], *reversed(chunks[1::2])], dim)


def own_part(sequences: Tensor, dim: int, cp: int, rank: int) -> Tensor:
    """What a cp rank holds: (..., S, ...) -> (..., S / CP, ...)."""
    if cp == 1:
        return sequences
    chunks = sequences.chunk(2 * cp, dim)
    return torch.cat((chunks[rank], chunks[-1 - rank]), dim)


def check_length(length: int, cp: int, tp: int = 1) -> None:
    """Raises: ConfigError if a sequence cannot be cut into 2 CP chunks, and a rank's two into TP pieces."""
    pieces = (2 * cp if cp > 1 else 1, cp * tp)
    for factor, shown in zip(pieces, ("2 x layout.cp", "layout.cp x layout.tp")):
        if length % factor:
            raise ConfigError(
                f"a sequence of {length} tokens does not divide into {shown} = {factor} equal parts, "
                f"allowed: data.sequence_length a multiple of it"
            )
