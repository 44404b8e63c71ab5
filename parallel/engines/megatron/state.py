"""Model and optimizer of a Megatron engine as whole tensors under our names, and back.

The distributed optimizer cuts a buffer of all parameters into flat slices, of which a rank's may begin and end in the
middle of a parameter. What it remembers of a parameter is put together over its data ranks, in the memory of the CPU;
then a tensor of ours is put together over the ranks that hold parts of it, and kept by one of them, in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ....kernels.errors import CheckpointError
from ...checkpoint.lazy import LazyTensor, constant
from ...checkpoint.read import check_shapes
from ...checkpoint.state import MODEL, OPTIMIZER
from ...meshes import Meshes
from ...process import together
from ..whole_state import Stored
from .optimizer import create_state, is_expert
from .part import LocalPart, MegatronPart

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


@dataclass(frozen=True, eq=False)
class Slice:
    """What this rank's optimizer updates of a parameter.

    Attributes:
        start, stop: of the flattened parameter.
        main: (stop - start,) float32, which AdamW knows.
        optimizer: torch's, that has it.
    """

    start: int
    stop: int
    main: Tensor
    optimizer: torch.optim.Optimizer

    def cut(self, parameter: Tensor) -> Tensor:
        return parameter.reshape(-1)[self.start : self.stop]

    @property
    def memory(self) -> dict[str, Any]:
        return self.optimizer.state.get(self.main, {})


class MegatronState:
    """Reads and writes what parts and optimizers hold."""

    def __init__(self, parts: Sequence[MegatronPart], optimizers: Any, meshes: Meshes, device: torch.device) -> None:
        self.parts = list(parts)
        self.meshes = meshes
        self.device = device
        self.optimizers = optimizers.chained_optimizers
        self.slices = {parameter: own for optimizer in self.optimizers for parameter, own in _slices(optimizer)}
        self._groups = {
            is_expert(parameter): optimizer.data_parallel_group
            for optimizer in self.optimizers
            for chunk in optimizer.model_chunks
            for parameter in chunk.parameters()
            if is_expert(parameter) == optimizer.param_groups[0]["is_expert_parallel"]
        }
        # Of what is here: our tensors that a parameter holds; shapes by our names, also of those that learn; on how
        # many ranks with the same data the same elements of a parameter are.
        self._names: dict[Tensor, list[str]] = {}
        self._parameters: dict[str, torch.Size] = {}
        self.trained: dict[str, torch.Size] = {}
        self._buffers: dict[str, torch.Size] = {}
        self.copies: dict[Tensor, int] = {}
        for part in self.parts:
            self._look_at(part)

    def _look_at(self, part: MegatronPart) -> None:
        """Find out what a part holds, by asking for numbers in the place of parameters.

        Megatron marks parameters that tp ranks cut, but not where another gives them their values.
        """
        layout, parameters = self.meshes.layout, list(part.parameters())
        numbered = _filled({parameter: number for number, parameter in enumerate(parameters)})
        for name, held in part.local_parts(numbered).items():
            parameter = parameters[int(held.values.max())]
            self._names.setdefault(parameter, []).append(name)
            self._parameters[name] = held.shape
            if parameter.requires_grad:
                self.trained[name] = held.shape
            cut = math.prod(cut.group.size() for cut in held.cuts)
            self.copies[parameter] = (layout.ep * layout.etp if is_expert(parameter) else layout.tp) // cut
        self._buffers |= {name: buffer.shape for name, buffer in part.live_buffers().items()}

    def gradients(self, part: MegatronPart) -> Callable[[Tensor], Tensor]:
        """Whole gradients of this rank's parameters, of which Megatron leaves each data rank its slice."""
        return self._whole(part, lambda parameter, own: own.cut(parameter.main_grad))  # type: ignore[attr-defined]

    def collect(self) -> dict[str, Tensor]:
        """As `Engine.state_dict` promises, but copies on the CPU of what is cut."""
        state: dict[str, Tensor] = {}
        for part in self.parts:
            state |= {f"{MODEL}{name}": value for name, value in self._kept(part, self._values(part)).items()}
            state |= {f"{MODEL}{name}": buffer for name, buffer in part.live_buffers().items()}
            steps = self._steps(part)
            if not any(steps.values()):
                continue  # before the first step nothing is remembered
            for key in MOMENTS:
                kept = self._kept(part, self._whole(part, lambda _, own, key=key: own.memory[key]))
                state |= {f"{OPTIMIZER}{name}.{key}": value for name, value in kept.items() if name in self.trained}
            for parameter, count in steps.items():
                names = [name for name in self._names[parameter] if name in self.trained]
                state |= {f"{OPTIMIZER}{name}.{STEP}": torch.tensor(count, dtype=torch.float32) for name in names}
        return state

    def _values(self, part: MegatronPart) -> Callable[[Tensor], Tensor]:
        """Float32 parameters: where they are rounded, those of the optimizers."""
        if all(parameter.dtype == torch.float32 for parameter in part.parameters()):
            return lambda parameter: parameter.detach().cpu()
        whole = self._whole(part, lambda _, own: own.main.detach())
        return lambda parameter: whole(parameter) if parameter.requires_grad else parameter.detach().float().cpu()

    def _whole(self, part: MegatronPart, take: Callable[[Tensor, Slice], Tensor]) -> Callable[[Tensor], Tensor]:
        """Slices of all data ranks put together, by parameter, on the CPU. Every rank must call it."""
        found: dict[Tensor, Tensor] = {}
        for parameter in part.parameters():
            flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=self.device)
            if parameter in self.slices:
                own = self.slices[parameter]
                flat[own.start : own.stop] = take(parameter, own)
            if parameter.requires_grad and (group := self._groups[is_expert(parameter)]).size() > 1:
                dist.all_reduce(flat, group=group)
            found[parameter] = flat.view(parameter.shape).cpu()
        return found.__getitem__

    def _kept(self, part: MegatronPart, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Whole tensors of ours on the CPU, each by one rank of the stage, in turn. Every rank must call it."""
        kept = {}
        ranks = self.meshes.layout.stage
        for number, (name, held) in enumerate(part.local_parts(of).items()):
            whole = _gathered(held)
            if number % ranks == self.meshes.rank % ranks:
                kept[name] = whole.clone() if whole is held.values else whole
        return kept

    def _steps(self, part: MegatronPart) -> dict[Tensor, float]:
        """How many steps were made of each parameter, as its data ranks agree. Every rank must call it."""
        parameters = list(part.parameters())
        counts = torch.zeros(len(parameters), dtype=torch.float64, device=self.device)
        for row, parameter in enumerate(parameters):
            own = self.slices.get(parameter)
            counts[row] = 0.0 if own is None else float(own.memory.get(STEP, 0.0))
        if self.meshes.stage_group is not None:
            dist.all_reduce(counts, dist.ReduceOp.MAX, self.meshes.stage_group)
        return dict(zip(parameters, counts.tolist()))

    def check(self, model: Stored, remembered: Stored, source: Path) -> None:
        """Raises: CheckpointError, on every rank, if these are not the tensors of this model and optimizer."""
        self._check(source, model, {**self._parameters, **self._buffers})
        if remembered:
            self._check(source, remembered, self._memory_shapes())

    def _check(self, source: Path, tensors: Stored, shapes: Mapping[str, torch.Size]) -> None:
        own = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        elsewhere = self.meshes.names_elsewhere(shapes)
        found = {name: tensor.shape for name, tensor in tensors.items()}
        together(lambda: check_shapes(source, found, own, elsewhere))

    def _memory_shapes(self) -> dict[str, torch.Size]:
        shapes = {f"{name}.{key}": shape for name, shape in self.trained.items() for key in MOMENTS}
        return {**shapes, **{f"{name}.{STEP}": torch.Size() for name in self.trained}}

    @torch.no_grad()
    def fill_model(self, tensors: Stored, source: Path) -> None:
        self._check(source, tensors, {**self._parameters, **self._buffers})
        read = together(lambda: [self._read(part, tensors) for part in self.parts])
        buffers = together(lambda: {name: tensors[name].read() for name in self._buffers})
        for part, values in zip(self.parts, read, strict=True):
            self._put(values)
            for name, live in part.live_buffers().items():
                live.copy_(buffers[name])

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        for part in self.parts:
            self._put(self._read(part, part.initial_values(seed)))

    def _put(self, values: Mapping[Tensor, Tensor]) -> None:
        """Give parameters their values, and the optimizers theirs, which are not rounded."""
        for parameter, value in values.items():
            parameter.data.copy_(value)
            own = self.slices.get(parameter)
            if own is not None:
                own.main.data.copy_(own.cut(value))

    def _read(self, part: MegatronPart, tensors: Mapping[str, Tensor | LazyTensor]) -> dict[Tensor, Tensor]:
        """What this rank's parameters would be, in float32, with whole tensors of ours; nothing changes."""
        values = {
            parameter: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            for parameter in part.parameters()
        }
        part.load_ours(tensors, values.__getitem__)
        return values

    @torch.no_grad()
    def fill_optimizer(self, tensors: Stored, source: Path) -> None:
        self._check(source, tensors, self._memory_shapes())
        for part in self.parts:
            counts = together(lambda part=part: self._counts(part, tensors, source))
            moments = {key: together(lambda key=key, part=part: self._moment(part, tensors, key)) for key in MOMENTS}
            for optimizer in self.optimizers:
                create_state(optimizer.optimizer)
            for parameter in counts:
                own = self.slices.get(parameter)
                if own is not None:
                    for key in MOMENTS:
                        own.memory[key].copy_(own.cut(moments[key][parameter]))
                    own.memory[STEP].fill_(counts[parameter])

    def _moment(self, part: MegatronPart, tensors: Stored, key: str) -> dict[Tensor, Tensor]:
        """One of what is remembered, by parameter; nothing of those that do not learn."""
        stored = {
            name: tensors[f"{name}.{key}"] if name in self.trained else constant(0.0, shape)
            for name, shape in self._parameters.items()
        }
        return self._read(part, stored)

    def _counts(self, part: MegatronPart, tensors: Stored, source: Path) -> dict[Tensor, float]:
        """Steps made of each parameter. Raises: CheckpointError where tensors that share a parameter differ in it."""
        counts = {}
        for parameter in part.parameters():
            numbers = {
                name: float(tensors[f"{name}.{STEP}"].read()) for name in self._names[parameter] if name in self.trained
            }
            for name, number in numbers.items():
                first, count = next(iter(numbers.items()))
                if number != count:
                    raise CheckpointError(
                        f"{source}: {first}.{STEP} is {count:g} and {name}.{STEP} is {number:g}, but Megatron keeps "
                        "both in one parameter, with one count, allowed: engine=torch"
                    )
                counts[parameter] = count
        return counts

    def forget_optimizer(self) -> None:
        for optimizer in self.optimizers:
            optimizer.optimizer.state.clear()


def _slices(optimizer: Any) -> Iterator[tuple[Tensor, Slice]]:
    """What a DistributedOptimizer of this rank updates, by the parameter that it is a slice of."""
    pairs = (
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
    )
    for groups, slices in pairs:
        for group, mains in zip(groups, slices, strict=True):
            for parameter, main in zip(group, mains, strict=True):
                at = optimizer._get_model_param_range_map(parameter)["param"]
                yield parameter, Slice(at.start, at.end, main, optimizer.optimizer)


def _filled(numbers: Mapping[Tensor, float]) -> Callable[[Tensor], Tensor]:
    """In the place of each parameter its number, in its shape."""
    return lambda parameter: torch.full((), numbers[parameter]).expand(parameter.shape)


def _gathered(held: LocalPart) -> Tensor:
    """The whole tensor, put together over the groups that it is cut over."""
    whole = held.values
    for cut in held.cuts:
        if cut.group.size() > 1:
            pieces = [torch.empty_like(whole, memory_format=torch.contiguous_format) for _ in range(cut.group.size())]
            dist.all_gather(pieces, whole.contiguous(), group=cut.group)
            whole = torch.cat(pieces, cut.dim)
    return whole
