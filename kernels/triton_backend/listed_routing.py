"""Routing tables of assignments listed in any order, on the device: a set of bits in the place of a sort.

A pair occurs at most once, so the list is a set of bits (token, expert), and the place of a pair in the list sorted by
expert is a count of bits. Three launches, no sort of N keys, no host synchronisation; T x E / 4 bytes of temporaries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import registered
from .launch import launch

_BLOCK = 1024  # assignments of one program
_WORDS = 64  # words of 32 tokens that a program scans at a time
_COLUMNS = 32  # experts that a program scans


@triton.jit
def _count_bits(word):
    """Set bits of each element of an int32 tensor."""
    x = word.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _given(row, token, expert, keep, num_rows):
    """Token, expert, and whether it counts or does not, of the assignments in these rows of the caller's list."""
    valid = row < num_rows
    t = tl.load(token + row, mask=valid, other=0).to(tl.int64)
    e = tl.load(expert + row, mask=valid, other=0).to(tl.int64)
    kept = valid
    if keep is not None:
        kept = valid & (tl.load(keep + row, mask=valid, other=0) != 0)
    return t, e, kept, valid & (kept == 0)


@triton.jit(do_not_specialize=["num_rows"])
def mark_kernel(token, expert, keep, bits, dropped, num_rows, num_experts, BLOCK: tl.constexpr):
    """Set bit (token % 32) of bits[token // 32, expert] for each pair that counts; count the others of each block."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t, e, kept, lost = _given(row, token, expert, keep, num_rows)
    bit = tl.full((BLOCK,), 1, tl.int32) << (t % 32).to(tl.int32)
    tl.atomic_or(bits + (t // 32) * num_experts + e, bit, mask=kept)  # the same bits in any order
    tl.store(dropped + tl.program_id(0), tl.sum(lost.to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_words"])
def scan_kernel(bits, before, totals, num_words, num_experts, WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """before[word, expert]: tokens of the expert in earlier words; totals[expert]: all of them."""
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    running = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, num_words, WORDS):
        word = first + tl.arange(0, WORDS)
        inside = (word < num_words)[:, None] & (expert < num_experts)[None, :]
        at = word[:, None].to(tl.int64) * num_experts + expert[None, :]
        count = _count_bits(tl.load(bits + at, mask=inside, other=0))
        tl.store(before + at, tl.cumsum(count, 0) - count + running[None, :], mask=inside)
        running += tl.sum(count, 0)
    tl.store(totals + expert, running, mask=expert < num_experts)


@triton.jit
def _list_tokens(
    part,
    start,
    bits,
    before,
    token_out,
    assignment,
    token_offsets,
    num_tokens,
    num_experts,
    EXPERTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """List the pairs of LANES tokens, all in one word of bits, by expert and by token."""
    expert = tl.arange(0, EXPERTS)
    token = part * LANES + tl.arange(0, LANES)
    at = (part * LANES // 32).to(tl.int64) * num_experts + expert
    marked = tl.load(bits + at, mask=expert < num_experts, other=0)
    below = (tl.full((EXPERTS,), 1, tl.int32) << (part * LANES % 32)) - 1
    earlier = tl.load(before + at, mask=expert < num_experts, other=0) + _count_bits(marked & below)
    bit = (marked[:, None] >> (token % 32)[None, :]) & 1
    count = tl.sum(bit, 0)
    first = tl.sum(earlier, 0) + tl.cumsum(count, 0) - count  # of each token, in the list by token
    place = (start + earlier)[:, None] + tl.cumsum(bit, 1) - bit
    rank = tl.cumsum(bit, 0) - bit
    tl.store(token_offsets + token, first, mask=token < num_tokens)
    tl.store(token_out + place, tl.broadcast_to(token[None, :], (EXPERTS, LANES)), mask=bit != 0)
    tl.store(assignment + first[None, :] + rank, place, mask=bit != 0)


@triton.jit
def _place_rows(
    block,
    start,
    kept_total,
    token,
    expert,
    keep,
    bits,
    before,
    dropped,
    token_out,
    order,
    assignment,
    num_rows,
    num_experts,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Say where each given assignment went; those that do not count go behind the others, as they come."""
    row = block * BLOCK + tl.arange(0, BLOCK)
    t, e, kept, lost = _given(row, token, expert, keep, num_rows)
    at = (t // 32) * num_experts + e
    below = (tl.full((BLOCK,), 1, tl.int32) << (t % 32).to(tl.int32)) - 1
    inside = _count_bits(tl.load(bits + at, mask=kept, other=0) & below)
    place = tl.gather(start, tl.where(kept, e, 0).to(tl.int32), 0) + tl.load(before + at, mask=kept, other=0) + inside
    lost_before = tl.zeros((BLOCKS,), tl.int32)
    for first in range(0, block, BLOCKS):
        b = first + tl.arange(0, BLOCKS)
        lost_before += tl.load(dropped + b, mask=b < block, other=0)
    count = lost.to(tl.int32)
    place = tl.where(kept, place, kept_total + tl.sum(lost_before, 0) + tl.cumsum(count, 0) - count)
    tl.store(order + place, row.to(tl.int64), mask=row < num_rows)
    tl.store(token_out + place, t.to(tl.int32), mask=lost)
    tl.store(assignment + place, place, mask=lost)


@triton.jit(do_not_specialize=["num_rows", "num_parts", "num_tokens"])
def place_kernel(
    token,
    expert,
    keep,
    bits,
    before,
    totals,
    dropped,
    token_out,
    order,
    expert_offsets,
    assignment,
    token_offsets,
    num_rows,
    num_parts,
    num_tokens,
    num_experts,
    EXPERTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The first programs list the pairs of LANES tokens each, the others place a block of assignments each."""
    e = tl.arange(0, EXPERTS)
    total = tl.load(totals + e, mask=e < num_experts, other=0)
    start = tl.cumsum(total, 0) - total
    kept_total = tl.sum(total, 0)
    program = tl.program_id(0)
    if program == 0:
        tl.store(expert_offsets + e, start, mask=e < num_experts)
        tl.store(expert_offsets + num_experts, kept_total)
        tl.store(token_offsets + num_tokens, kept_total)
    if program < num_parts:
        _list_tokens(
            program,
            start,
            bits,
            before,
            token_out,
            assignment,
            token_offsets,
            num_tokens,
            num_experts,
            EXPERTS,
            LANES,
        )
    else:
        _place_rows(
            program - num_parts,
            start,
            kept_total,
            token,
            expert,
            keep,
            bits,
            before,
            dropped,
            token_out,
            order,
            assignment,
            num_rows,
            num_experts,
            BLOCK,
            BLOCKS,
        )


def build_tables(
    token: Tensor, expert: Tensor, num_tokens: int, num_experts: int, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tables of a Routing for assignments (N,) in any order, those with keep (N,) false at the end as padding.

    Returns: token, order, expert_offsets, assignment, token_offsets as in `Routing`, all int32 but `order` (N,) int64,
        the position in the given list of each sorted assignment.
    """
    rows = token.numel()

    def table(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=token.device)

    if not rows:
        return table(0), table(0, torch.int64), table(num_experts + 1).zero_(), table(0), table(num_tokens + 1).zero_()
    given: dict[str, Any] = {"token": token.contiguous(), "expert": expert.contiguous()}
    given["keep"] = None if keep is None else keep.contiguous()
    bins = max(2, triton.next_power_of_2(num_experts))
    words, blocks = triton.cdiv(num_tokens, 32), triton.cdiv(rows, _BLOCK)
    bits = table(words * num_experts).zero_()
    before, totals, dropped = table(words * num_experts), table(num_experts), table(blocks)
    token_out, order, assignment = table(rows), table(rows, torch.int64), table(rows)
    expert_offsets, token_offsets = table(num_experts + 1), table(num_tokens + 1)
    sizes = {"num_rows": rows, "num_experts": num_experts}
    scanned: dict[str, Any] = {"bits": bits, "before": before, "totals": totals}
    lanes = max(1, min(32, 8192 // bins))  # a thread then holds what its registers do
    with torch.cuda.device_of(token):
        launch(mark_kernel, (blocks,), **given, **sizes, bits=bits, dropped=dropped, BLOCK=_BLOCK)
        launch(
            scan_kernel,
            (triton.cdiv(num_experts, _COLUMNS),),
            **scanned,
            num_words=words,
            num_experts=num_experts,
            WORDS=_WORDS,
            COLUMNS=_COLUMNS,
        )
        launch(
            place_kernel,
            (words * (32 // lanes) + blocks,),
            warps=8 if num_experts > 128 else 4,
            **given,
            **sizes,
            **scanned,
            dropped=dropped,
            token_out=token_out,
            order=order,
            expert_offsets=expert_offsets,
            assignment=assignment,
            token_offsets=token_offsets,
            num_parts=words * (32 // lanes),
            num_tokens=num_tokens,
            EXPERTS=bins,
            LANES=lanes,
            BLOCK=_BLOCK,
            BLOCKS=256,
        )
    return token_out, order, expert_offsets, assignment, token_offsets


listed_routing_tables = registered("listed_routing_tables")(build_tables)


@listed_routing_tables.register_fake
def _(token, expert, num_tokens, num_experts, keep=None):
    sizes = {"token": token.shape[0], "order": token.shape[0], "expert_offsets": num_experts + 1}
    sizes |= {"assignment": token.shape[0], "token_offsets": num_tokens + 1}
    dtypes = {"order": torch.int64}
    return tuple(token.new_empty(size, dtype=dtypes.get(name, torch.int32)) for name, size in sizes.items())
