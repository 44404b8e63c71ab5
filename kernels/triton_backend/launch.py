"""The host side of each kernel: shapes, grids, configurations. Every launch goes through `launch`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..activations import GATED
from . import combine, configs, gemm, tiles, weight_grad
from .configs import Config, Problem


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as recorded: enough to compile the very same kernel ahead of time."""

    kernel: Any
    args: dict[str, Any]
    warps: int
    stages: int


_recorded: list[Launch] | None = None
_LEAST_CHUNK = 8  # of a cut weight gradient, in steps of its main loop: below, writing the product costs more


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; tensors may be on the meta device."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, grid: tuple[int, ...], warps: int = 4, stages: int = 3, **args: Any) -> None:
    """Run a kernel on a grid of programs."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, warps, stages))
        return
    kernel[grid](**args, num_warps=warps, num_stages=stages)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 3  # the interpreter: few, so that persistent loops turn


def precision(x: Tensor) -> str:
    """float32 products are exact unless the user allows less by torch.set_float32_matmul_precision."""
    if x.device.type == "cpu":
        return "upcast"
    exact = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


@dataclass
class Groups:
    """Rows sorted by expert, and the tile tables of one operator call."""

    expert_offsets: Tensor
    num_rows: int
    _tables: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return self.expert_offsets.numel() - 1

    def table(self, block_m: int) -> Tensor:
        if block_m not in self._tables:
            self._tables[block_m] = self._build(block_m)
        return self._tables[block_m]

    def bound(self, block_m: int) -> int:
        """The most tiles that any distribution of rows over experts can need."""
        return triton.cdiv(self.num_rows, block_m) + min(self.num_experts, self.num_rows)

    def _build(self, block_m: int) -> Tensor:
        bound = self.bound(block_m)
        table = torch.empty(1 + 3 * bound, dtype=torch.int32, device=self.expert_offsets.device)
        experts = triton.next_power_of_2(self.num_experts)
        per_program = max(1, min(64, 16384 // experts, triton.next_power_of_2(bound)))
        launch(
            tiles.tile_table_kernel,
            (triton.cdiv(bound, per_program),),
            expert_offsets=self.expert_offsets,
            table=table,
            bound=bound,
            num_experts=self.num_experts,
            rows_per_tile=block_m,
            EXPERTS=experts,
            TILES=per_program,
        )
        return table


def _tiled(groups: Groups, config: Config, columns: int, device: torch.device) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and tile arguments of a kernel over (row tiles of experts) x (column tiles)."""
    programs = groups.bound(config.block_m) * columns
    if config.persistent:
        programs = min(programs, _multiprocessors(device))
    arguments = {
        "expert_offsets": groups.expert_offsets,
        "table": groups.table(config.block_m),
        "bound": groups.bound(config.block_m),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    return (programs,), arguments


def _descriptor(config: Config, t: Tensor, shape: list[int], strides: list[int], block: list[int]):
    """A TMA descriptor of a tensor, or None where the hardware or the alignment has none."""
    aligned = all(stride > 0 and stride * t.element_size() % 16 == 0 for stride in strides[:-1])
    aligned = aligned and t.data_ptr() % 16 == 0
    if not (config.tma and aligned and configs.has_tma(t.device)):
        return None
    return TensorDescriptor(t, shape, strides, block)


def rows_of(t: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a contiguous copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def up(
    x: Tensor,
    token: Tensor,
    w: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    a: Tensor | None,
    groups: Groups,
    activation: str,
) -> None:
    """Fill z (N, 2F or F), the pre-activation, and a (N, F), the activation; either may be None."""
    halves = 2 if activation in GATED else 1
    width, outputs = x.shape[1], w.shape[1] // halves

    def run(config: Config) -> None:
        grid, tiled = _tiled(groups, config, triton.cdiv(outputs, config.block_n), x.device)
        w_desc = _descriptor(
            config,
            w,
            [w.shape[0], halves, outputs, width],
            [w.stride(0), outputs * w.stride(1), w.stride(1), 1],
            [1, halves, config.block_n, config.block_k],
        )
        launch(
            gemm.up_kernel,
            grid,
            config.warps,
            config.stages,
            x=x,
            token=token,
            w=w,
            w_desc=w_desc,
            bias=bias,
            z=z,
            a=a,
            F=outputs,
            D=width,
            stride_x=x.stride(0),
            stride_we=w.stride(0),
            stride_wr=w.stride(1),
            ACT=GATED.get(activation, activation),
            HALVES=halves,
            TMA=w_desc is not None,
            EVEN_K=width % config.block_k == 0,
            PARTS=config.parts,
            PRECISION=precision(x),
            **tiled,
        )

    configs.run(Problem("up", x.dtype, groups.num_rows, groups.num_experts, outputs, width, halves), x.device, run)


def _matrix(w: Tensor, outputs: int, contracted: int, k_rows: bool, config: Config):
    """Descriptor of weights (E, outputs, contracted), or (E, contracted, outputs) with k_rows."""
    strides = [w.stride(0), w.stride(1), 1]
    if k_rows:
        return _descriptor(config, w, [w.shape[0], contracted, outputs], strides, [1, config.block_k, config.block_n])
    shape, strides = [w.shape[0], 1, outputs, contracted], [strides[0], outputs * strides[1], *strides[1:]]
    return _descriptor(config, w, shape, strides, [1, 1, config.block_n, config.block_k])


def rows(
    x: Tensor,
    x_index: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    y_index: Tensor | None,
    groups: Groups,
    k_rows: bool = False,
) -> None:
    """Fill y[y_index] = x[x_index] @ w[expert].T + bias; with k_rows, x[x_index] @ w[expert] + bias."""
    outputs, contracted = y.shape[1], x.shape[1]

    def run(config: Config) -> None:
        grid, tiled = _tiled(groups, config, triton.cdiv(outputs, config.block_n), x.device)
        w_desc = _matrix(w, outputs, contracted, k_rows, config)
        x_desc = None
        if x_index is None:
            x_desc = _descriptor(config, x, list(x.shape), list(x.stride()), [config.block_m, config.block_k])
        launch(
            gemm.rows_kernel,
            grid,
            config.warps,
            config.stages,
            x=x,
            x_desc=x_desc,
            x_index=x_index,
            w=w,
            w_desc=w_desc,
            bias=bias,
            y=y,
            y_index=y_index,
            N=outputs,
            K=contracted,
            stride_x=x.stride(0),
            stride_we=w.stride(0),
            stride_wr=w.stride(1),
            stride_y=y.stride(0),
            W_K_ROWS=k_rows,
            TMA=w_desc is not None,
            EVEN_K=contracted % config.block_k == 0,
            EVEN_N=outputs % config.block_n == 0,
            PRECISION=precision(x),
            **tiled,
        )

    kernel = "rows_k" if k_rows else "rows"
    configs.run(Problem(kernel, x.dtype, groups.num_rows, groups.num_experts, outputs, contracted), x.device, run)


def dact(
    grad: Tensor,
    token: Tensor,
    w_out: Tensor,
    z: Tensor,
    weight: Tensor,
    dz: Tensor,
    weighted: Tensor,
    groups: Groups,
    activation: str,
) -> Tensor:
    """Fill dz like z and weighted (N, F); returns the partial gradients of the combine weights, (column tiles, N)."""
    halves = 2 if activation in GATED else 1
    outputs, contracted = w_out.shape[2], w_out.shape[1]
    partials: list[Tensor] = []

    def run(config: Config) -> None:
        columns = triton.cdiv(outputs, config.block_n)
        grid, tiled = _tiled(groups, config, columns, grad.device)
        w_desc = _matrix(w_out, outputs, contracted, True, config)
        partials[:] = [torch.empty(columns, groups.num_rows, dtype=torch.float32, device=grad.device)]
        launch(
            gemm.dact_kernel,
            grid,
            config.warps,
            config.stages,
            grad=grad,
            token=token,
            w=w_out,
            w_desc=w_desc,
            z=z,
            weight=weight,
            dz=dz,
            weighted=weighted,
            partial=partials[0],
            num_rows=groups.num_rows,
            F=outputs,
            D=contracted,
            stride_g=grad.stride(0),
            stride_we=w_out.stride(0),
            stride_wr=w_out.stride(1),
            ACT=GATED.get(activation, activation),
            HALVES=halves,
            TMA=w_desc is not None,
            EVEN_K=contracted % config.block_k == 0,
            EVEN_N=outputs % config.block_n == 0,
            PARTS=config.parts,
            PRECISION=precision(grad),
            **tiled,
        )

    problem = Problem("dact", grad.dtype, groups.num_rows, groups.num_experts, outputs, contracted, halves)
    configs.run(problem, grad.device, run)
    return partials[0]


def _rows_descriptor(config: Config, x: Tensor, index: Tensor | None, columns: int):
    """A descriptor of blocks of rows in place; None for gathered rows, which no descriptor of Hopper's reaches."""
    if index is not None:
        return None
    return _descriptor(config, x, list(x.shape), list(x.stride()), [config.block_k, columns])


def _rows_per_chunk(num_rows: int, tiles: int, block_k: int, device: torch.device) -> int | None:
    """Into how many rows to cut the experts' rows for a weight gradient, None for no cut.

    A matrix of twice as many tiles as there are multiprocessors fills them alone. A smaller one must not keep a few
    of them busy for longer than a quarter of what all of them need together. So at most 8 * multiprocessors tiles of
    partial products exist at a time, whatever the shapes.
    """
    processors = _multiprocessors(device)
    if tiles >= 2 * processors:
        return None
    rows = max(num_rows * tiles // (4 * processors), _LEAST_CHUNK * block_k)
    rows = triton.cdiv(rows, 64) * 64
    return rows if rows < num_rows else None


def weight_gradient(
    a: Tensor, a_index: Tensor | None, b: Tensor, b_index: Tensor | None, out: Tensor, groups: Groups
) -> None:
    """Fill out (E, P, Q) with a[a_index].T @ b[b_index] over each expert's rows."""
    num_experts, p, q = out.shape

    def run(config: Config) -> None:
        tiles = triton.cdiv(p, config.block_m) * triton.cdiv(q, config.block_n)
        chunk = _rows_per_chunk(groups.num_rows, tiles, config.block_k, a.device)
        slots = 2 * groups.num_rows // chunk if chunk else 0
        partial = torch.empty(slots, p, q, dtype=torch.float32, device=a.device) if chunk else None
        programs = (groups.bound(chunk) if chunk else num_experts) * tiles
        if config.persistent:
            programs = min(programs, _multiprocessors(a.device))
        launch(
            weight_grad.weight_grad_kernel,
            (programs,),
            config.warps,
            config.stages,
            a=a,
            a_desc=_rows_descriptor(config, a, a_index, config.block_m),
            a_index=a_index,
            b=b,
            b_desc=_rows_descriptor(config, b, b_index, config.block_n),
            b_index=b_index,
            out=out,
            partial=partial,
            expert_offsets=groups.expert_offsets,
            table=groups.table(chunk) if chunk else None,
            bound=groups.bound(chunk) if chunk else 0,
            rows_per_chunk=chunk or 0,
            num_experts=num_experts,
            P=p,
            Q=q,
            stride_a=a.stride(0),
            stride_b=b.stride(0),
            EVEN_P=p % config.block_m == 0,
            EVEN_Q=q % config.block_n == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            PRECISION=precision(a),
        )
        if chunk:
            launch(
                weight_grad.sum_chunks_kernel,
                (num_experts, triton.cdiv(p * q, 2048)),
                partial=partial,
                out=out,
                expert_offsets=groups.expert_offsets,
                num_experts=num_experts,
                rows_per_chunk=chunk,
                SIZE=p * q,
                EXPERTS=triton.next_power_of_2(num_experts),
                BLOCK=2048,
            )

    configs.run(Problem("weight_grad", a.dtype, groups.num_rows, num_experts, p, q), a.device, run)


def bias_gradient(rows: Tensor, index: Tensor | None, scale: Tensor | None, out: Tensor, groups: Groups) -> None:
    """Fill out (E, P) with the sum of scale * rows[index] over each expert's rows."""
    num_experts, p = out.shape
    block_p = min(128, triton.next_power_of_2(p))
    launch(
        weight_grad.bias_grad_kernel,
        (num_experts, triton.cdiv(p, block_p)),
        rows=rows,
        index=index,
        scale=scale,
        out=out,
        expert_offsets=groups.expert_offsets,
        P=p,
        stride=rows.stride(0),
        BLOCK_K=32,
        BLOCK_P=block_p,
    )


def sum_by_token(y: Tensor, weight: Tensor | None, assignment: Tensor, token_offsets: Tensor, out: Tensor) -> None:
    """Fill out[t] with the sum of weight * y over the assignments of token t."""
    num_tokens, width = out.shape
    block_d = min(1024, triton.next_power_of_2(width))
    mean = -(-assignment.numel() // num_tokens)
    launch(
        combine.combine_kernel,
        (num_tokens, triton.cdiv(width, block_d)),
        warps=max(1, block_d // 256),
        y=y,
        weight=weight,
        assignment=assignment,
        token_offsets=token_offsets,
        out=out,
        D=width,
        stride_y=y.stride(0),
        BLOCK_K=min(8, triton.next_power_of_2(mean)),
        BLOCK_D=block_d,
    )


def weight_from_partials(
    partial: Tensor, grad: Tensor, token: Tensor, b_out: Tensor | None, out: Tensor, groups: Groups
) -> None:
    """Fill out (N,), the gradient of the combine weights: the partial products, and grad . b_out, in fixed order."""
    if b_out is not None:
        extra = torch.empty(1, groups.num_rows, dtype=torch.float32, device=partial.device)
        block_m = 32
        launch(
            combine.bias_dot_kernel,
            (groups.bound(block_m),),
            grad=grad,
            token=token,
            bias=b_out,
            partial=extra,
            expert_offsets=groups.expert_offsets,
            table=groups.table(block_m),
            bound=groups.bound(block_m),
            D=grad.shape[1],
            stride_g=grad.stride(0),
            BLOCK_M=block_m,
            BLOCK_D=min(128, triton.next_power_of_2(grad.shape[1])),
        )
        partial = torch.cat([partial, extra])
    launch(
        combine.sum_partials_kernel,
        (triton.cdiv(out.numel(), 256),),
        partial=partial,
        out=out,
        expert_offsets=groups.expert_offsets,
        num_experts=groups.num_experts,
        num_rows=groups.num_rows,
        NUM_PARTIALS=partial.shape[0],
        BLOCK=256,
    )
