"""Model and optimizer of a DeepSpeed engine as whole tensors under our names, and back.

What ZeRO cuts into flat slices, of which a rank's may begin and end in the middle of a parameter, is put together one
parameter at a time and kept by one rank each, in turn, in the memory of the CPU. So no rank holds more of a checkpoint
than its share and one parameter, and what is written says nothing about DeepSpeed, its stage or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.errors import CheckpointError
from ...checkpoint.fill import fill
from ...checkpoint.lazy import LazyTensor
from ...checkpoint.read import check_shapes
from ...checkpoint.state import (
    MODEL,
    OPTIMIZER,
    create_optimizer_state,
    model_state,
    optimizer_state,
    restore_numbers,
)
from ...meshes import Meshes
from ...process import together
from ...shards import local_range
from ..whole_state import Stored
from .experts import Cut, is_expert


class CopiedState:
    """Without ZeRO: everything is there, and needs only the right names."""

    def __init__(
        self, part: nn.Module, optimizer: torch.optim.Optimizer, cuts: Mapping[str, Cut], meshes: Meshes
    ) -> None:
        self.part = part
        self.optimizer = optimizer
        self.cuts = cuts
        self.meshes = meshes

    def collect(self) -> dict[str, Tensor]:
        """Live tensors, as `Engine.state_dict` promises."""
        return {**self._with_kind(MODEL, self._model()), **self._with_kind(OPTIMIZER, self._remembered())}

    def check(self, model: Stored, remembered: Stored, source: Path) -> None:
        """Raises: CheckpointError, on every rank, if these are not the tensors of this model and optimizer."""
        together(lambda: check_shapes(source, _shapes(model), self._model_shapes()))
        if remembered:
            self._check_optimizer(remembered, source)

    def _check_optimizer(self, tensors: Stored, source: Path) -> None:
        """Let the optimizer make what it remembers, unless it has, and compare; give it up again if that fails."""
        created = not self.optimizer.state
        if created:
            self._create()
        try:
            together(lambda: check_shapes(source, _shapes(tensors), self._optimizer_shapes()))
        except CheckpointError:
            if created:
                self.forget_optimizer()
            raise

    def fill_model(self, tensors: Stored, source: Path) -> None:
        fill(self._model(), tensors, source)

    def fill_optimizer(self, tensors: Stored, source: Path) -> None:
        self._check_optimizer(tensors, source)
        state = self._remembered()
        fill(state, tensors, source)
        restore_numbers(self.optimizer, self._with_kind(OPTIMIZER, state), self.part)

    def _create(self) -> None:
        create_optimizer_state(self.optimizer)

    def forget_optimizer(self) -> None:
        self.optimizer.state.clear()

    def _model(self) -> dict[str, Tensor]:
        return self._whole({name.removeprefix(MODEL): tensor for name, tensor in model_state(self.part).items()})

    def _remembered(self) -> dict[str, Tensor]:
        state = optimizer_state(self.optimizer, self.part)
        return self._whole({name.removeprefix(OPTIMIZER): tensor for name, tensor in state.items()})

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of experts as the distributed tensors that they are parts of; numbers stay numbers."""
        found = {}
        for name, tensor in tensors.items():
            cut = self.cuts.get(name) or self.cuts.get(name.rpartition(".")[0])
            found[name] = tensor if cut is None or tensor.ndim == 0 else cut.whole(tensor)
        return found

    @staticmethod
    def _with_kind(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{kind}{name}": tensor for name, tensor in tensors.items()}

    def _shape(self, name: str, parameter: nn.Parameter) -> torch.Size:
        """Of the whole parameter."""
        return self.cuts[name].shape if name in self.cuts else getattr(parameter, "ds_shape", parameter.shape)

    def _model_shapes(self) -> dict[str, Tensor]:
        """Tensors without memory in the shapes that a checkpoint must have."""
        parameters = dict(self.part.named_parameters())
        shapes = {name.removeprefix(MODEL): tensor.shape for name, tensor in model_state(self.part).items()}
        shapes |= {name: self._shape(name, parameter) for name, parameter in parameters.items()}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def _optimizer_shapes(self) -> Mapping[str, Tensor]:
        """The same of what the optimizer remembers."""
        return self._remembered()


class ZeroState(CopiedState):
    """With ZeRO: the optimizer in flat slices, and in stage 3 the parameters as well.

    Reads and writes through the functions that DeepSpeed offers for it (deepspeed.utils.safe_*).
    """

    def __init__(self, engine: Any, stage: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.zero = engine.optimizer
        self.stage = stage
        groups = self.zero.fp16_groups if stage == 3 else self.zero.bit16_groups
        self.group_of = {parameter: number for number, group in enumerate(groups) for parameter in group}

    @property
    def flats(self) -> list[Tensor]:
        """This rank's slice of each group of parameters, by which the optimizer's memory is kept."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def collect(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state = self._with_kind(MODEL, self._model())
        self._link()
        for number, (name, parameter) in enumerate(self._trained()):
            for key, value in self._memory(parameter).items():
                full = f"{OPTIMIZER}{name}.{key}"
                if value.ndim == 0:
                    state[full] = value
                    continue
                gathered: Any = safe_get_full_optimizer_state(parameter, key)
                if self._keeps(number, parameter):
                    state.update(self._kept(full, name, gathered))
        return state

    def _model(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return super()._model()
        import deepspeed

        found = {}
        parameters = dict(self.part.named_parameters())
        for number, (name, parameter) in enumerate(parameters.items()):
            with deepspeed.zero.GatheredParameters([parameter]):
                if self._keeps(number, parameter):
                    found[name] = parameter.data.to("cpu", copy=True)
        state = {name.removeprefix(MODEL): tensor for name, tensor in model_state(self.part).items()}
        return {**found, **{name: tensor for name, tensor in state.items() if name not in parameters}}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.part.named_parameters() if p.requires_grad)

    def _memory(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the optimizer remembers of the slice that a parameter is in; the same names on all ranks."""
        remembered = self.optimizer.state.get(self.flats[self.group_of[parameter]], {})
        numbers = {key: torch.tensor(float(v)) for key, v in remembered.items() if isinstance(v, (int, float))}
        return {key: value for key, value in remembered.items() if isinstance(value, Tensor)} | numbers

    def _optimizer_shapes(self) -> Mapping[str, Tensor]:
        return {
            f"{name}.{key}": torch.empty(self._shape(name, parameter) if value.ndim > 0 else (), device="meta")
            for name, parameter in self._trained()
            for key, value in self._memory(parameter).items()
        }

    def _keeps(self, number: int, parameter: nn.Parameter) -> bool:
        """Whether this rank is the one to keep the parameter with this number, of those that gather it."""
        if is_expert(parameter):
            return number % self.meshes.layout.edp == self.meshes.coordinates.edp
        return number % self.meshes.layout.world == self.meshes.rank

    def _kept(self, full: str, name: str, gathered: Tensor) -> dict[str, Tensor]:
        return {full: self.cuts[name].whole(gathered) if name in self.cuts else gathered.to("cpu")}

    @torch.no_grad()
    def fill_model(self, tensors: Stored, source: Path) -> None:
        together(lambda: check_shapes(source, _shapes(tensors), self._model_shapes()))
        parameters = dict(self.part.named_parameters())
        for name, parameter in parameters.items():
            # In stage 3 what rank 0 has goes to all; else all read.
            value = together(lambda name=name, p=parameter: self._read(tensors[name], name, p) if self._reads else None)
            with self._opened(parameter):
                if value is not None:
                    parameter.data.copy_(value)
        rest = {name: tensor for name, tensor in super()._model().items() if name not in parameters}
        fill(rest, {name: tensors[name] for name in rest}, source)
        self.zero.refresh_fp32_params()

    @property
    def _reads(self) -> bool:
        return self.stage < 3 or self.meshes.rank == 0

    def _opened(self, parameter: nn.Parameter) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3)

    def _read(self, tensor: LazyTensor, name: str, parameter: nn.Parameter) -> Tensor:
        """The values of the parameter as this rank has it when it is whole."""
        if name not in self.cuts:
            return tensor.read()
        whole = self.cuts[name].whole(parameter.data)
        return tensor.read([local_range(whole, dim) for dim in range(whole.ndim)])

    @torch.no_grad()
    def fill_optimizer(self, tensors: Stored, source: Path) -> None:
        self._check_optimizer(tensors, source)
        counts = together(lambda: self._counts(tensors, source))
        self._link()
        for name, parameter in self._trained():
            for key, own in self._memory(parameter).items():
                if own.ndim > 0:
                    stored = tensors[f"{name}.{key}"]
                    value = together(lambda s=stored, n=name, p=parameter: self._read(s, n, p))
                    self._set(parameter, key, value.to(self.flats[0].device))
        for number, found in counts.items():
            remembered = self.optimizer.state[self.flats[number]]
            for key, count in found.items():
                kept = remembered[key]
                remembered[key] = torch.full_like(kept, count) if isinstance(kept, Tensor) else type(kept)(count)

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # The same function fails in stage 3 for a parameter that the ranks do not divide, which is padded.
        size, rank = parameter.ds_tensor.numel(), self.meshes.rank  # type: ignore[attr-defined]
        padded = value.new_zeros(size * self.meshes.layout.world)
        padded[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(parameter, padded[size * rank : size * (rank + 1)], key)

    def _counts(self, tensors: Stored, source: Path) -> dict[int, dict[str, float]]:
        """The numbers that the optimizer keeps with each slice: its count of steps.

        Raises: CheckpointError if parameters of one slice differ in it, which ZeRO cannot express.
        """
        counts: dict[int, dict[str, float]] = {}
        of: dict[tuple[int, str], str] = {}
        for name, parameter in self._trained():
            number = self.group_of[parameter]
            for full in (n for n in tensors if n.rpartition(".")[0] == name and len(tensors[n].shape) == 0):
                key, value = full.rpartition(".")[2], float(tensors[full].read())
                before = counts.setdefault(number, {}).setdefault(key, value)
                first = of.setdefault((number, key), full)
                if before != value:
                    raise CheckpointError(
                        f"{source}: {first} is {before:g} and {full} is {value:g}, but ZeRO has one {key} for both, "
                        "allowed: engine.zero_stage=0, or engine=torch"
                    )
        return counts

    def _create(self) -> None:
        """Let the optimizer allocate its memory, by a step with zero gradients and zero learning rate."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for number, flat in enumerate(self.flats):
            buffer = flat.grad  # with offload there is one, which stays
            flat.grad = torch.zeros_like(flat) if buffer is None else buffer.zero_()
            self.zero._optimizer_step(number)
            flat.grad = buffer
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate

    def _link(self) -> None:
        """Let parameters find what the optimizer remembers of them.

        Stages 1 and 2 do that when the first group of parameters has made its first step, which is too early for the
        other groups, and never again.
        """
        if self.stage < 3 and all(flat in self.optimizer.state for flat in self.flats):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()


def make_state(
    engine: Any,
    part: nn.Module,
    optimizer: torch.optim.Optimizer,
    stage: int,
    cuts: Mapping[str, Cut],
    meshes: Meshes,
) -> CopiedState:
    """What turns the state of this stage into a checkpoint of ours."""
    if stage == 0:
        return CopiedState(part, optimizer, cuts, meshes)
    return ZeroState(engine, stage, part, optimizer, cuts, meshes)


def _shapes(tensors: Stored) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
