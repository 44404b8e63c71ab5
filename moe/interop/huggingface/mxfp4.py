"""MXFP4, in which GPT-OSS is published: 32 values share a power of two, two values of 4 bits a byte.

A value is E2M1 (OCP Microscaling Formats 1.0, section 5.3.3): sign, two bits of exponent, one of mantissa. The scale of
a block is E8M0 (section 5.4.1): 2^(s - 127), and 255 is no number. The even value of a byte is in its low half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....parallel.checkpoint.lazy import Index, LazyTensor

BLOCK = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))


def dequantise(blocks: Tensor, scales: Tensor) -> Tensor:
    """(..., G, 16) uint8 and (..., G) uint8 -> (..., 32 G) bfloat16, exactly."""
    values = torch.tensor(_VALUES)
    pairs = torch.stack((values[(blocks & 0x0F).int()], values[(blocks >> 4).int()]), -1)
    exponent = scales.int() - 127
    scaled = torch.ldexp(pairs, exponent[..., None, None]).to(torch.bfloat16)
    scaled[scales == 255] = torch.nan
    return scaled.flatten(-3)


def dequantised(blocks: LazyTensor, scales: LazyTensor) -> LazyTensor:
    """(E, R, G, 16) and (E, R, G) uint8 as (E, R, 32 G) bfloat16; reads the blocks that are touched."""
    experts, rows, groups = scales.shape

    def fetch(index: Index) -> Tensor:
        start, stop = index[2].start, index[2].stop
        first, last = start // BLOCK, -(-stop // BLOCK)
        held = [*index[:2], slice(first, last)]
        whole = dequantise(blocks.read([*held, slice(0, BLOCK // 2)]), scales.read(held))
        return whole[..., start - first * BLOCK : stop - first * BLOCK].clone()

    return LazyTensor(torch.Size((experts, rows, groups * BLOCK)), torch.bfloat16, fetch)


def blank_blocks(tensor: LazyTensor) -> LazyTensor:
    """The shape and dtype of the blocks of a (E, R, C)."""
    experts, rows, columns = tensor.shape
    return LazyTensor(torch.Size((experts, rows, columns // BLOCK, BLOCK // 2)), torch.uint8, _unread)


def blank_scales(tensor: LazyTensor) -> LazyTensor:
    """The same of its scales."""
    experts, rows, columns = tensor.shape
    return LazyTensor(torch.Size((experts, rows, columns // BLOCK)), torch.uint8, _unread)


def _unread(_: Index) -> Tensor:
    raise AssertionError("MXFP4 is read, never written")
