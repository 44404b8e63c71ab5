"""The matrices of one MLP as lazy tensors, and what is done to all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from ...parallel.checkpoint.lazy import Index, LazyTensor, narrow, pointwise, stack


@dataclass(frozen=True)
class Factors:
    """One number for each matrix of an MLP, and the factor of the router's combine weights."""

    gate: float = 1.0
    up: float = 1.0
    down: float = 1.0
    output: float = 1.0

    def power(self, exponent: int) -> Factors:
        return Factors(*(getattr(self, field.name) ** exponent for field in fields(self)))


@dataclass(frozen=True)
class Matrices:
    """gate (F, D), None where the activation is not gated, up (F, D) and down (D, F) of one MLP."""

    gate: LazyTensor | None
    up: LazyTensor
    down: LazyTensor

    @classmethod
    def of(cls, tensors: Mapping[str, LazyTensor], prefix: str, suffix: str = "") -> Matrices:
        """Those of a dense MLP, `prefix` being its name with a dot; of its optimizer's state with a suffix."""
        names = (f"{prefix}{name}.weight{suffix}" for name in ("w_gate", "w_up", "w_out"))
        gate, up, down = (tensors.get(name) for name in names)
        assert up is not None and down is not None  # the stored model was checked
        return cls(gate, up, down)

    def items(self) -> Iterator[tuple[str, LazyTensor, int]]:
        """Name, matrix and the dimension of the neurons, of each that is there."""
        for name, dim in (("gate", 0), ("up", 0), ("down", 1)):
            matrix = getattr(self, name)
            if matrix is not None:
                yield name, matrix, dim

    def map(self, function: Callable[[str, LazyTensor, int], LazyTensor]) -> Matrices:
        """Each matrix replaced by what the function makes of its name, itself and the dimension of its neurons."""
        made = {name: function(name, matrix, dim) for name, matrix, dim in self.items()}
        return Matrices(made.get("gate"), made["up"], made["down"])

    def neurons(self, start: int, length: int) -> Matrices:
        """Consecutive neurons, which are an MLP of their own."""
        return self.map(lambda _, matrix, dim: narrow(matrix, dim, start, length))

    def reordered(self, order: Callable[[], Tensor]) -> Matrices:
        """The neurons in another order, drawn again whenever it is needed."""
        return self.map(lambda _, matrix, dim: _reordered(matrix, dim, order))

    def scaled(self, factors: Factors) -> Matrices:
        return self.map(lambda name, matrix, _: scaled(matrix, getattr(factors, name)))

    def dense(self, prefix: str, suffix: str = "") -> dict[str, LazyTensor]:
        """Under the names of a dense MLP."""
        names = {"gate": "w_gate", "up": "w_up", "down": "w_out"}
        return {f"{prefix}{names[name]}.weight{suffix}": matrix for name, matrix, _ in self.items()}


def stacked(experts: Sequence[Matrices], prefix: str, suffix: str = "") -> dict[str, LazyTensor]:
    """The tensors of `Experts`: w_in (E, 2, F, D), or (E, F, D) without a gate, and w_out (E, D, F)."""
    inputs = [expert.up if expert.gate is None else stack([expert.gate, expert.up]) for expert in experts]
    return {
        f"{prefix}w_in{suffix}": stack(inputs),
        f"{prefix}w_out{suffix}": stack([expert.down for expert in experts]),
    }


def scaled(tensor: LazyTensor, factor: float) -> LazyTensor:
    """The tensor times a number, rounded once to its dtype."""
    return tensor if factor == 1.0 else pointwise(tensor, lambda values: values * factor)


def _reordered(matrix: LazyTensor, dim: int, order: Callable[[], Tensor]) -> LazyTensor:
    def fetch(index: Index) -> Tensor:
        wanted = order()[index[dim]]
        whole = slice(0, matrix.shape[dim])
        return matrix.read([*index[:dim], whole, *index[dim + 1 :]]).index_select(dim, wanted)

    return LazyTensor(matrix.shape, matrix.dtype, fetch)
