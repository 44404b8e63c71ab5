"""The default engine: plain torch on one process, DDP for copies, FSDP2 for shards, both for hybrid layouts."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ...kernels.errors import ConfigError
from ..checkpoint.read import check_fits, check_whole, load, read_shapes
from ..checkpoint.state import OPTIMIZER, create_optimizer_state, model_state, optimizer_state, restore_numbers
from ..layout import Layout, ResolvedLayout
from ..process import Process, together
from .gradients import clip_gradients, gradient_norms

PRECISIONS = ("fp32", "bf16")


class TorchEngine:
    """How torch spreads a model over a layout; `prepare` does it.

        with torch.device("meta"):
            model = plan.make_model()
        engine = TorchEngine().prepare(
            model, AdamW(lr=1e-3), process=process, layout=Layout(dp_shard=8), units=model.sharding_units(),
            float32=[layer.router for _, layer in model.moe_layers()], precision="bf16", seed=0,
        )
        engine.load(newest)     # or engine.load_weights(init_from)

    Args:
        reshard_after_forward: free the gathered parameters of a unit after its forward pass and gather them again for
            its backward pass (less memory); False keeps them (less communication). For dp_shard > 1.
        reduce_every_micro_batch: reduce-scatter gradients after each micro-batch, so that no rank ever holds whole
            gradients; False sums micro-batches first and communicates once a step. For dp_shard > 1.
        bucket_mb: size of the buckets in which copies sum their gradients, in MiB. For dp_shard = 1.
        compile_backend: what torch.compile generates code with; aot_eager needs no compiler. For trainer.compile.

    Raises: ConfigError for a bucket size that is not above 0.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        reduce_every_micro_batch: bool = False,
        bucket_mb: float = 25.0,
        compile_backend: str = "inductor",
    ) -> None:
        if not bucket_mb > 0:
            raise ConfigError(f"engine.bucket_mb={bucket_mb} is out of range, allowed: above 0")
        self.reshard_after_forward = reshard_after_forward
        self.reduce_every_micro_batch = reduce_every_micro_batch
        self.bucket_mb = bucket_mb
        self.compile_backend = compile_backend

    def prepare(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        process: Process,
        layout: Layout,
        units: Sequence[nn.Module] = (),
        float32: Sequence[nn.Module] = (),
        precision: str = "fp32",
        compile: bool = False,
        deterministic: bool = False,
        seed: int = 0,
    ) -> TorchTraining:
        """Spread the model and make its optimizer.

        bf16 means the same in every layout: float32 parameters, and autocast for the forward pass. Sharded matrices
        of a unit travel as bfloat16, which is the rounding that autocast would do after the gather; all that autocast
        leaves in float32 (`float32`, norms and other vectors, and what is outside of units) stays float32.

        Args:
            model: on the meta device, to be created shard by shard with `model.reset_parameters(seed)`; or with its
                values, the same on every rank.
            make_optimizer: called with the model after sharding.
            units: submodules that are gathered, freed and compiled one at a time: the blocks.
            float32: submodules whose own computation is in float32 under bf16: the routers.
            compile: torch.compile each unit.
            deterministic: let torch refuse operations that do not give the same bits twice, from here on.

        Raises: ConfigError for an unknown precision or a layout that does not fit the world.
        """
        if precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision={precision!r} is unknown, allowed: {', '.join(PRECISIONS)}")
        resolved = layout.resolve(process.world)
        if deterministic:
            _refuse_nondeterminism()
        if compile:
            self._compile(units)
        is_meta = any(parameter.is_meta for parameter in model.parameters())
        if not is_meta:
            model.to(process.device)
        whole = _float32_names(model, units, float32) if precision == "bf16" and resolved.dp_shard > 1 else set()
        if resolved.dp_shard > 1:
            self._shard(model, units, whole, resolved, process.device, precision)
        if is_meta:
            model.to_empty(device=process.device)
            model.reset_parameters(seed)  # type: ignore[operator]
        copies = resolved.dp_shard == 1 and resolved.dp_replicate > 1
        optimizer = make_optimizer(model)
        _separate_sharded(optimizer)
        return TorchTraining(
            self._replicate(model, process) if copies else model,
            model,
            optimizer,
            device=process.device,
            precision=precision,
            whole=whole,
            reduce_every_micro_batch=self.reduce_every_micro_batch,
        )

    def _compile(self, units: Sequence[nn.Module]) -> None:
        backends = torch.compiler.list_backends(exclude_tags=())
        if self.compile_backend not in backends:
            allowed = ", ".join(sorted(backends))
            raise ConfigError(f"engine.compile_backend={self.compile_backend!r} is unknown, allowed: {allowed}")
        for unit in units:
            unit.compile(backend=self.compile_backend)

    def _shard(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        whole: set[str],
        layout: ResolvedLayout,
        device: torch.device,
        precision: str,
    ) -> None:
        mesh = layout.mesh(device.type)
        if layout.dp_replicate == 1:
            mesh = mesh["dp_shard"]
        ignored = {parameter for name, parameter in model.named_parameters() if name in whole}
        cast = torch.bfloat16 if precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in units:
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=self.reshard_after_forward,
                ignored_params=ignored,
            )
        outside = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(model, mesh=mesh, mp_policy=outside, ignored_params=ignored)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Both are needed for a plain sum: with a factor alone torch asks for PREMUL_SUM, which gloo lacks.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def _replicate(self, model: nn.Module, process: Process) -> nn.Module:
        # Router biases are updated from global counts, so every copy has the same without sending them. torch 2.13
        # renamed the option.
        known = inspect.signature(DistributedDataParallel).parameters
        synced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        wrapper = DistributedDataParallel(
            model,
            device_ids=[process.device] if process.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.bucket_mb,  # type: ignore[arg-type]
            **{synced: False},  # type: ignore[arg-type]
        )
        wrapper.register_comm_hook(None, _sum_bucket)
        return wrapper


class TorchTraining:
    """The `Engine` that `TorchEngine.prepare` returns; see `base.Engine` for what its methods promise."""

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        precision: str,
        whole: set[str],
        reduce_every_micro_batch: bool,
    ) -> None:
        self.model = model
        self.module = module
        self.optimizer = optimizer
        self._device = device
        self._autocast = precision == "bf16"
        self._whole = whole
        self._reduce_always = reduce_every_micro_batch
        self._shards = [child for child in module.modules() if isinstance(child, FSDPModule)]
        self._last_micro_batch = True

    @contextlib.contextmanager
    def forward_context(self, last_micro_batch: bool) -> Iterator[None]:
        self._last_micro_batch = last_micro_batch
        with contextlib.ExitStack() as stack:
            if isinstance(self.module, FSDPModule):
                self.module.set_requires_gradient_sync(last_micro_batch or self._reduce_always)
                self.module.set_requires_all_reduce(last_micro_batch)
                self.module.set_is_last_backward(last_micro_batch)
            elif isinstance(self.model, DistributedDataParallel) and not last_micro_batch:
                stack.enter_context(self.model.no_sync())
            stack.enter_context(self.evaluation_context())
            yield

    def evaluation_context(self) -> contextlib.AbstractContextManager[None]:
        if not self._autocast:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)  # type: ignore[return-value]

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if self._last_micro_batch and self._whole:
            self._sum_whole_gradients()

    def _sum_whole_gradients(self) -> None:
        """Sum over all ranks the gradients of the parameters that are whole beside sharded ones, in one message."""
        gradients = [p.grad for name, p in self.module.named_parameters() if name in self._whole]
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            return
        flat = torch.cat([gradient.flatten() for gradient in present])
        dist.all_reduce(flat)
        for gradient, summed in zip(present, flat.split([gradient.numel() for gradient in present])):
            gradient.copy_(summed.view_as(gradient))

    def clip(self, max_norm: float | None) -> Tensor:
        return clip_gradients(self.module.parameters(), max_norm, self._device)

    def grad_norms_by_parameter(self) -> dict[str, float]:
        return gradient_norms(dict(self.module.named_parameters()))

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        self._reshard()
        return {**model_state(self.module), **optimizer_state(self.module, self.optimizer)}

    def load(self, path: Path) -> None:
        self._reshard()

        def look() -> bool:
            check_whole(path)
            check_fits(path, model_state(self.module))
            return any(name.startswith(OPTIMIZER) for name in read_shapes(path))

        if not together(look):  # written before the first step, so there is nothing to remember
            self.optimizer.state.clear()
            return load(path, model_state(self.module))
        created = not self.optimizer.state
        if created:
            create_optimizer_state(self.optimizer)
        try:
            state = self.state_dict()
            load(path, state)
        except Exception:
            if created:
                self.optimizer.state.clear()
            raise
        restore_numbers(self.module, self.optimizer, state)

    def load_weights(self, path: Path) -> None:
        self._reshard()
        load(path, model_state(self.module))

    def _reshard(self) -> None:
        """Free parameters that a forward pass left gathered, so that names lead to shards."""
        for module in self._shards:
            module.reshard()


def _refuse_nondeterminism() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _sum_bucket(state, bucket):  # DDP compares annotations with its own classes and refuses strings
    """DDP's reduction as a plain sum, where its own would divide by the number of copies."""
    summed = dist.all_reduce(bucket.buffer(), async_op=True)
    return summed.get_future().then(lambda future: future.value()[0])  # type: ignore[union-attr]


def _float32_names(model: nn.Module, units: Sequence[nn.Module], float32: Sequence[nn.Module]) -> set[str]:
    """Parameters of units that bfloat16 must not round: vectors, and all of the given modules."""
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    chosen = {id(parameter) for module in float32 for parameter in module.parameters()}
    return {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in inside and (parameter.ndim < 2 or id(parameter) in chosen)
    }


def _separate_sharded(optimizer: torch.optim.Optimizer) -> None:
    """Split parameter groups that mix sharded and whole parameters, which torch's fused updates cannot do together."""
    for group in list(optimizer.param_groups):
        sharded = [parameter for parameter in group["params"] if isinstance(parameter, DTensor)]
        whole = [parameter for parameter in group["params"] if not isinstance(parameter, DTensor)]
        if sharded and whole:
            group["params"] = sharded
            optimizer.add_param_group({**{key: group[key] for key in group if key != "params"}, "params": whole})
