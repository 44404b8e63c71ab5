"""Which neuron of one expert stands for which of another: an assignment of the largest sum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def match_neurons(reference: Tensor, other: Tensor) -> list[int]:
    """For each neuron of the reference, the neuron of the other expert that takes its place.

    The permutation with the largest sum of inner products of the neurons' weights (weight matching of Git Re-Basin,
    2209.04836, which M-SMoE uses before it merges).

    Args:
        reference, other: (F, n), all weights of each neuron.
    """
    return best_assignment((reference.float() @ other.float().T).double().numpy())


def best_assignment(gain: np.ndarray) -> list[int]:
    """For each row the column, each column once, that gives the largest sum of gains: (F, F) -> F columns.

    The Hungarian method with shortest augmenting paths: at most F^3 steps, of which F at a time are one operation.
    """
    size = len(gain)
    cost = gain.max(initial=0.0) - gain
    row_price, column_price = np.zeros(size), np.zeros(size + 1)
    row_of = np.full(size + 1, -1)  # by column; the last is where each search begins
    for row in range(size):
        row_of[size], column = row, size
        shortest, came_from = np.full(size + 1, np.inf), np.full(size, size)
        done = np.zeros(size + 1, dtype=bool)
        while row_of[column] >= 0:
            done[column] = True
            at = row_of[column]
            reduced = cost[at] - row_price[at] - column_price[:size]
            better = ~done[:size] & (reduced < shortest[:size])
            shortest[:size][better], came_from[better] = reduced[better], column
            open_columns = np.where(done[:size], np.inf, shortest[:size])
            nearest = int(open_columns.argmin())
            step = open_columns[nearest]
            row_price[row_of[done]] += step
            column_price[done] -= step
            shortest[:size][~done[:size]] -= step
            column = nearest
        while column != size:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    result = [0] * size
    for column, row in enumerate(row_of[:size].tolist()):
        result[row] = column
    return result


def neurons(tensors: list[Tensor], dims: list[int]) -> Tensor:
    """All weights of each neuron of an expert, (F, n), given the dimension of the neurons in each of its tensors."""
    return torch.cat([t.movedim(dim, 0).reshape(t.shape[dim], -1) for t, dim in zip(tensors, dims)], dim=1)
