"""Routing tables on the device: a counting sort in two launches, with no sort of N keys and no host synchronisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import registered
from .launch import launch

_BLOCK = 1024  # slots of one program; a slot is a (token, k) pair, k padded to a power of two


@triton.jit
def _slots(block, experts, keep, num_tokens, num_experts, K, SLOTS_K: tl.constexpr, BLOCK: tl.constexpr):
    """Token, expert (num_experts: dropped, BINS - 1: no slot) and validity of the slots of one block."""
    slot = tl.arange(0, BLOCK)
    token = block * (BLOCK // SLOTS_K) + slot // SLOTS_K
    k = slot % SLOTS_K
    valid = (token < num_tokens) & (k < K)
    at = token.to(tl.int64) * K + k
    expert = tl.load(experts + at, mask=valid, other=0).to(tl.int32)
    if keep is not None:
        expert = tl.where(tl.load(keep + at, mask=valid, other=0) != 0, expert, num_experts)
    return token, k, expert, valid


@triton.jit(do_not_specialize=["num_tokens"])
def count_kernel(
    experts, keep, counts, num_tokens, num_experts, K, SLOTS_K: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """counts[block, expert]: how many slots of each block of tokens go to each expert; column num_experts: dropped."""
    _, _, expert, valid = _slots(tl.program_id(0), experts, keep, num_tokens, num_experts, K, SLOTS_K, BLOCK)
    counted = tl.histogram(expert, BINS, mask=valid)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), counted)


@triton.jit(do_not_specialize=["num_blocks", "num_tokens"])
def place_kernel(
    experts,
    keep,
    counts,
    token_out,
    order,
    expert_offsets,
    assignment,
    token_offsets,
    num_blocks,
    num_tokens,
    num_experts,
    K,
    SLOTS_K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Give every slot of a block its place in the list sorted by expert, stable by token, and in the list by token."""
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)  # slots of the same expert in earlier blocks
    for first in range(0, num_blocks, ROWS):
        b = first + tl.arange(0, ROWS)
        part = tl.load(counts + b[:, None] * BINS + bins[None, :], mask=(b < num_blocks)[:, None], other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where((b < block)[:, None], part, 0), 0)
    mine = tl.load(counts + block * BINS + bins)
    start = tl.cumsum(total, 0) - total
    kept_total = tl.sum(tl.where(bins < num_experts, total, 0), 0)
    if block == 0:
        tl.store(expert_offsets + bins, start, mask=bins <= num_experts)

    token, k, expert, valid = _slots(block, experts, keep, num_tokens, num_experts, K, SLOTS_K, BLOCK)
    kept = valid & (expert < num_experts)
    slot = tl.arange(0, BLOCK)
    # Sort the block by (expert, slot); the place is then the expert's start plus the rank within the expert.
    key = tl.sort(tl.where(valid, expert, BINS) * BLOCK + slot)
    sorted_slot = key % BLOCK  # pyright: ignore[reportOperatorIssue]
    sorted_bin = tl.minimum(key // BLOCK, BINS - 1)
    shift = start + before - (tl.cumsum(mine, 0) - mine)
    place = slot + tl.gather(shift, sorted_bin, 0)
    sorted_token = block * (BLOCK // SLOTS_K) + sorted_slot // SLOTS_K
    in_list = key < BINS * BLOCK
    tl.store(token_out + place, sorted_token, mask=in_list)
    tl.store(order + place, sorted_token.to(tl.int64) * K + sorted_slot % SLOTS_K, mask=in_list)

    # The same list by token: kept slots before this token, and the rank of the expert among the token's experts.
    running = tl.cumsum(kept.to(tl.int32), 0)
    kept_before = tl.sum(tl.where(bins < num_experts, before, 0), 0)
    exclusive = running - kept.to(tl.int32) + kept_before
    tl.store(token_offsets + token, exclusive, mask=(k == 0) & (token < num_tokens))
    if block == num_blocks - 1:
        tl.store(token_offsets + num_tokens, kept_total)
    at_token = tl.gather(exclusive, (sorted_slot // SLOTS_K) * SLOTS_K, 0)
    sorted_expert = key // BLOCK
    rank = tl.zeros((BLOCK,), tl.int32)
    for other in range(K):
        at = sorted_token.to(tl.int64) * K + other
        expert_other = tl.load(experts + at, mask=in_list, other=0).to(tl.int32)
        smaller = expert_other < sorted_expert
        if keep is not None:
            smaller = smaller & (tl.load(keep + at, mask=in_list, other=0) != 0)
        rank += smaller.to(tl.int32)
    is_kept = in_list & (sorted_expert < num_experts)
    tl.store(assignment + at_token + rank, place, mask=is_kept)
    tl.store(assignment + place, place, mask=in_list & (sorted_expert >= num_experts))  # padding stays where it is


def build_tables(
    experts: Tensor, num_experts: int, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tables of a Routing for experts (T, K) chosen per token, those with keep (T, K) false at the end as padding.

    Returns: token, order, expert_offsets, assignment, token_offsets as in `Routing`, all int32 but `order` (N,) int64,
        the position in the flattened (T, K) of each sorted assignment.
    """
    num_tokens, top_k = experts.shape
    experts = experts.contiguous()
    keep = None if keep is None else keep.contiguous()

    def table(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=experts.device)

    if not experts.numel():
        return table(0), table(0, torch.int64), table(num_experts + 1).zero_(), table(0), table(num_tokens + 1).zero_()
    slots_k = triton.next_power_of_2(top_k)
    block = max(slots_k, min(_BLOCK, slots_k * triton.next_power_of_2(num_tokens)), 16)
    bins = triton.next_power_of_2(num_experts + 1)
    num_blocks = triton.cdiv(num_tokens, block // slots_k)
    counts = table(num_blocks * bins)
    token, order, assignment = table(experts.numel()), table(experts.numel(), torch.int64), table(experts.numel())
    expert_offsets, token_offsets = table(num_experts + 1), table(num_tokens + 1)
    shape = {"num_tokens": num_tokens, "num_experts": num_experts, "K": top_k}
    tiles = {"SLOTS_K": slots_k, "BINS": bins, "BLOCK": block}
    with torch.cuda.device_of(experts):
        launch(count_kernel, (num_blocks,), experts=experts, keep=keep, counts=counts, **shape, **tiles)
        launch(
            place_kernel,
            (num_blocks,),
            experts=experts,
            keep=keep,
            counts=counts,
            token_out=token,
            order=order,
            expert_offsets=expert_offsets,
            assignment=assignment,
            token_offsets=token_offsets,
            num_blocks=num_blocks,
            ROWS=max(1, min(16, 4096 // bins)),
            **shape,
            **tiles,
        )
    return token, order, expert_offsets, assignment, token_offsets


routing_tables = registered("routing_tables")(build_tables)


@routing_tables.register_fake
def _(experts, num_experts, keep=None):
    sizes = {"token": experts.numel(), "order": experts.numel(), "expert_offsets": num_experts + 1}
    sizes |= {"assignment": experts.numel(), "token_offsets": experts.shape[0] + 1}
    dtypes = {"order": torch.int64}
    return tuple(experts.new_empty(size, dtype=dtypes.get(name, torch.int32)) for name, size in sizes.items())
