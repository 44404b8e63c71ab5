"""Lazy tensors against plain indexing of the tensors that they stand for."""

import random

import pytest
import torch

from scatterfold.parallel.checkpoint import lazy
from scatterfold.parallel.checkpoint.lazy import LazyTensor, in_memory


def numbers(*shape, seed=0):
    return torch.randint(0, 10_000, shape, generator=torch.Generator().manual_seed(seed)).float()


A, B, C = numbers(4, 6, 5, seed=1), numbers(4, 6, 5, seed=2), numbers(4, 3, 5, seed=3)

CASES = {
    "in_memory": (in_memory(A), A),
    "constant": (lazy.constant(2.5, (4, 3)), torch.full((4, 3), 2.5)),
    "constant of a dtype": (lazy.constant(1, (7,), torch.int64), torch.ones(7, dtype=torch.int64)),
    "computed": (lazy.computed((4, 6, 5), torch.float32, lambda: A * 2), A * 2),
    "pointwise": (lazy.pointwise(in_memory(A), torch.sqrt), A.sqrt()),
    "pointwise to a dtype": (lazy.pointwise(in_memory(A), lambda x: x > 5000, torch.bool), A > 5000),
    "to": (in_memory(A).to(torch.bfloat16), A.bfloat16()),
    "stack": (lazy.stack([in_memory(A), in_memory(B), in_memory(A)]), torch.stack([A, B, A])),
    "cat 0": (lazy.cat([in_memory(A), in_memory(B)]), torch.cat([A, B])),
    "cat 1": (lazy.cat([in_memory(A), in_memory(C), in_memory(B)], 1), torch.cat([A, C, B], 1)),
    "cat with an empty one": (lazy.cat([in_memory(A), in_memory(A[:0]), in_memory(B)]), torch.cat([A, B])),
    "cat of dtypes": (lazy.cat([in_memory(A), in_memory(B.half())]), torch.cat([A, B.half().float()])),
    "narrow 0": (lazy.narrow(in_memory(A), 0, 1, 2), A.narrow(0, 1, 2)),
    "narrow 2": (lazy.narrow(in_memory(A), 2, 3, 2), A.narrow(2, 3, 2)),
    "select": (lazy.select(in_memory(A), 2), A[2]),
    "take 0": (lazy.take(in_memory(A), 0, [3, 0, 0, 2]), A[[3, 0, 0, 2]]),
    "take 1": (lazy.take(in_memory(A), 1, range(1, 6, 2)), A[:, 1:6:2]),
    "transpose": (lazy.transpose(in_memory(A), 0, 2), A.transpose(0, 2)),
    "transpose of neighbours": (lazy.transpose(in_memory(A), 1, 2), A.transpose(1, 2)),
    "reshape": (lazy.reshape(in_memory(A), (8, 15)), A.reshape(8, 15)),
    "scalar": (in_memory(torch.tensor(3.0)), torch.tensor(3.0)),
    "of one another": (
        lazy.transpose(lazy.cat([lazy.narrow(in_memory(A), 1, 1, 3), in_memory(C)], 1), 1, 2),
        torch.cat([A[:, 1:4], C], 1).transpose(1, 2),
    ),
    "experts of a stack": (
        lazy.stack([lazy.cat([lazy.select(in_memory(A), e), lazy.select(in_memory(C), e)]) for e in range(4)]),
        torch.cat([A, C], 1),
    ),
}


def random_cut(size, rng):
    start = rng.randint(0, size)
    return slice(start, rng.randint(start, size))


@pytest.mark.parametrize("name", CASES)
def test_any_part_is_that_of_the_whole(name):
    tensor, expected = CASES[name]
    assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
    assert tensor.bytes == expected.nbytes
    assert torch.equal(tensor.read(), expected)
    rng = random.Random(name)
    for _ in range(40):
        index = [random_cut(size, rng) for size in expected.shape]
        part = tensor.read(index)
        assert part.dtype == expected.dtype and torch.equal(part, expected[tuple(index)]), index
    empty = [slice(size, size) for size in expected.shape]
    assert torch.equal(tensor.read(empty), expected[tuple(empty)])


@pytest.mark.parametrize("name", CASES)
def test_what_was_read_may_be_written_to(name):
    tensor, expected = CASES[name]
    before = expected.clone()
    tensor.read().zero_()
    assert torch.equal(tensor.read(), before)


def test_ranges_and_open_ends_are_cuts_too():
    tensor = in_memory(A)
    assert torch.equal(tensor.read([range(1, 3), slice(None), slice(2, None)]), A[1:3, :, 2:])
    assert torch.equal(tensor.read([range(0), slice(None), slice(None)]), A[:0])
    assert torch.equal(tensor.read([slice(3, 99), slice(None), slice(None)]), A[3:])
    with pytest.raises(ValueError):
        tensor.read([slice(None)])


def counting(tensor):
    """The same tensor, and a list that gets the number of elements of each read."""
    reads = []

    def fetch(index):
        reads.append(tensor[index].numel())
        return tensor[index].clone()

    return LazyTensor(tensor.shape, tensor.dtype, fetch), reads


def test_only_what_is_wanted_is_read():
    """The promise that everything else is built on: a rank that holds one expert reads one expert."""
    parts = [counting(numbers(6, 5, seed=seed)) for seed in range(4)]
    lazy.stack([tensor for tensor, _ in parts]).read([slice(2, 3), slice(0, 3), slice(0, 5)])
    assert [reads for _, reads in parts] == [[], [], [15], []]
    first, second = counting(A), counting(B)
    lazy.cat([first[0], second[0]], 0).read([slice(5, 7), slice(0, 6), slice(0, 5)])
    assert (first[1], second[1]) == ([], [2 * 30])
    whole, reads = counting(A)
    lazy.select(whole, 3).read([slice(0, 2), slice(0, 5)])
    lazy.narrow(whole, 1, 2, 2).read()
    lazy.transpose(whole, 0, 2).read([slice(0, 1), slice(0, 6), slice(0, 4)])
    lazy.take(whole, 0, [2, 3]).read()
    assert reads == [10, 40, 24, 60]


def test_nothing_is_read_before_it_is_asked_for():
    def refuse(index):
        raise AssertionError("read too early")

    tensor = LazyTensor(torch.Size((4, 6, 5)), torch.float32, refuse)
    made = lazy.reshape(lazy.pointwise(lazy.transpose(lazy.take(tensor, 0, [1, 2]), 1, 2), torch.neg), (10, 6))
    stacked = lazy.cat([lazy.stack([made, made]), lazy.stack([made])]).to(torch.bfloat16)
    assert stacked.shape == (3, 10, 6) and stacked.bytes == 3 * 10 * 6 * 2
