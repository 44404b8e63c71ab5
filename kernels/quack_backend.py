"""`moe_mlp` by the GEMMs of the `quack-kernels` package (CuTe DSL), for Hopper and newer: `experts.backend=quack`.

Written against the public interface of quack-kernels 0.6.5 (`quack.gemm_interface`). Tested against its signatures and
documented semantics and compiled by it for sm_90; it has not run on a GPU, so no speed is known and nothing chooses it
unasked. Rows are gathered while they are loaded (`A_idx`), experts are cut by `cu_seqlens_m` where rows are the result
and by `cu_seqlens_k` where they are contracted, activation and its gradient run in the epilogues, and the gradient of a
combine weight is their row sum (`colvec_reduce`), as in SonicMoE.

Quack's gated epilogues want gate and up rows alternating. `concat_layout` lets them read, and write, our (E, 2F, D)
with the gate half first: no weight is copied. z and its gradient alternate in memory; only this file reads them.
Quack has no exact GELU, so GELU and GeGLU take plain GEMMs, our activations, and a z with its halves in our order.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from types import ModuleType

import torch
from torch import Tensor

from .activations import activate_backward_out, activate_out, is_gated
from .errors import ConfigError
from .fused_operator import ExpertLayer, fused_operator
from .grouped_mm import grouped_bias_grad, sum_by_token
from .routing import Routing
from .torch_backend import RowTables

# Whether it has been measured faster than what is chosen without it.
QUACK_IS_FASTER = False

DTYPES = (torch.bfloat16, torch.float16)
FUSED = {"swiglu": "swiglu", "reglu": "reglu", "silu": "silu", "relu": "relu", "relu2": "relu_sq"}  # our name: quack's


def _installed() -> str | None:
    """The version of quack-kernels, None if it is missing."""
    if importlib.util.find_spec("quack") is None:
        return None
    try:
        return importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_refuses(version: str | None) -> str | None:
    """Why this version of quack-kernels is not taken, None if it is."""
    if version is None:
        return "quack-kernels is not installed (pip install scatterfold[quack])"
    if not (0, 6, 5) <= tuple(int(n) for n in re.findall(r"\d+", version)[:3]) < (0, 7):
        return f"quack-kernels {version} is installed, allowed: >=0.6.5,<0.7 (pip install scatterfold[quack])"
    return None


PACKAGE_REFUSES = _package_refuses(_installed())  # a constant to torch.compile


def quack_refuses(device: torch.device, dtype: torch.dtype, *widths: int) -> str | None:
    """Why quack cannot run here, None if it can."""
    if PACKAGE_REFUSES:
        return PACKAGE_REFUSES
    if dtype not in DTYPES:
        return f"quack has no {str(dtype).removeprefix('torch.')}, only bfloat16 and float16"
    if device.type != "cuda":
        return f"quack needs a GPU, this is {device.type}"
    properties = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    if not 9 <= properties.major <= 12:
        found = f"{properties.major}.{properties.minor}"
        return f"quack needs compute capability 9.0 to 12.x, this device has {found}"
    return _width_refuses(*widths)


def _width_refuses(*widths: int) -> str | None:
    for width in widths:
        if width % 8:
            return f"quack needs widths that are multiples of 8, this one is {width}"
    return None


def _quack() -> ModuleType:
    """Imported where it is called: it takes seconds, and initialises CuTe."""
    from quack import gemm_interface  # pyright: ignore[reportMissingImports]

    return gemm_interface


def _options() -> dict[str, bool]:
    """Quack tunes for each exact N, for minutes; so, as with our kernels, only if it is asked for."""
    return {"dynamic_scheduler": False, "tuned": os.environ.get("SCATTERFOLD_AUTOTUNE") == "1"}


def _concat(activation: str, *names: str) -> tuple[str, ...] | None:
    """The operands that hold a gate half and an up half where quack expects alternating rows."""
    return names if activation in FUSED and is_gated(activation) else None


def forward_pass(layer: ExpertLayer, save_z: bool) -> tuple[Tensor, Tensor]:
    """GEMM with gathered rows and activation, GEMM, sum by token. See `fused_operator`."""
    x, w_in, w_out = _contiguous(layer.x, layer.w_in, layer.w_out)
    b_in, activation, expert_offsets = layer.b_in, layer.activation, layer.expert_offsets
    source = RowTables.of(layer).source
    if activation in FUSED:
        z, a = _quack().gemm_act(
            x,
            w_in.mT,
            bias=b_in,
            activation=FUSED[activation],
            cu_seqlens_m=expert_offsets,
            A_idx=source,
            store_preact=save_z,
            concat_layout=_concat(activation, "B", "bias"),
            **_options(),
        )
    else:
        z = _pre_activation(x, w_in, b_in, expert_offsets, source, activation)
        a = z.new_empty(z.shape[0], w_out.shape[2])
        activate_out(activation, z, a, a)
    if not save_z:
        z = a.new_empty(0)
    y = _quack().gemm(a, w_out.mT, bias=layer.b_out, cu_seqlens_m=expert_offsets, **_options())
    return sum_by_token(y, layer.weight, layer.assignment, layer.token_offsets), z


def backward_pass(layer: ExpertLayer, grad: Tensor, z: Tensor, needs: list[bool]) -> list[Tensor]:
    """The gradients; rows are gathered again while they are loaded. See `fused_operator`."""
    need_x, need_in, need_out, need_b_in, need_b_out, need_weight = needs
    b_out, weight, activation, expert_offsets = layer.b_out, layer.weight, layer.activation, layer.expert_offsets
    if not layer.token.numel():  # an empty contraction is not for kernels
        return layer.new_gradients(needs, torch.zeros_like)
    grads = layer.new_gradients([False] * 6)
    grad, x, w_in, w_out = _contiguous(grad, layer.x, layer.w_in, layer.w_out)
    tables = RowTables.of(layer)
    if not z.numel():
        z = _pre_activation(x, w_in, layer.b_in, expert_offsets, tables.source, activation)
    scale = torch.where(tables.counts, weight, 0)
    dz, weighted_a, inner = _dact(grad, w_out, z, scale, expert_offsets, tables.source, activation)
    del z
    if need_out:
        # (D, T) gathered over T, times (N, F)
        grads[2] = _quack().gemm(grad.T, weighted_a, cu_seqlens_k=expert_offsets, A_idx=tables.source, **_options())
    del weighted_a
    if need_weight:
        if b_out is not None:  # one product over all tokens and experts takes less memory than b_out of each row
            inner += (grad @ b_out.T)[tables.source, tables.expert].to(inner.dtype)
        grads[5] = torch.where(tables.counts, inner, 0).to(weight.dtype)
    if need_b_out:
        rows = grad[tables.source].mul_(scale[:, None].to(grad.dtype))
        grads[4] = grouped_bias_grad(rows, None, expert_offsets)
        del rows
    if need_in:
        # Only the left operand can be gathered, so this computes the transpose, through a transposed view.
        grads[1] = torch.empty_like(w_in)
        _quack().gemm(
            x.T,
            dz,
            out=grads[1].mT,
            cu_seqlens_k=expert_offsets,
            A_idx=tables.source,
            concat_layout=_concat(activation, "out"),
            **_options(),
        )
    if need_b_in:
        db_in = grouped_bias_grad(dz, None, expert_offsets)
        grads[3] = _halves(db_in) if _concat(activation, "bias") else db_in
    if need_x:
        dx = _quack().gemm(dz, w_in, cu_seqlens_m=expert_offsets, concat_layout=_concat(activation, "B"), **_options())
        del dz
        grads[0] = sum_by_token(dx, None, layer.assignment, layer.token_offsets)
    return grads


def _dact(
    grad: Tensor, w_out: Tensor, z: Tensor, scale: Tensor, offsets: Tensor, source: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of z, weight * activation, and the inner product of activation and its un-weighted gradient (N,)."""
    if activation in FUSED:
        return _quack().gemm_dact(
            grad,
            w_out,
            z,
            activation=FUSED[activation],
            colvec_scale=scale.float(),
            colvec_reduce=True,
            cu_seqlens_m=offsets,
            A_idx=source,
            **_options(),
        )
    da = _quack().gemm(grad, w_out, cu_seqlens_m=offsets, A_idx=source, **_options())
    a, dz = torch.empty_like(da), torch.empty_like(z)
    activate_out(activation, z, a, dz.chunk(2, dim=-1)[1] if is_gated(activation) else a)
    inner = torch.linalg.vecdot(da.float(), a.float())
    column = scale[:, None].to(a.dtype)
    activate_backward_out(activation, z, da.mul_(column), dz)
    return dz, a.mul_(column), inner


def _pre_activation(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, offsets: Tensor, source: Tensor, activation: str
) -> Tensor:
    concat = _concat(activation, "B", "bias")
    return _quack().gemm(x, w_in.mT, bias=b_in, cu_seqlens_m=offsets, A_idx=source, concat_layout=concat, **_options())


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    """As they are stored. An expanded gradient is not, and `concat_layout` halves whichever dimension has a stride."""
    return [t.contiguous() for t in tensors]


def _halves(alternating: Tensor) -> Tensor:
    """(E, 2F) with gate and up alternating to (E, 2F) with the gate half first."""
    return alternating.unflatten(-1, (-1, 2)).mT.flatten(-2)


_operator = fused_operator("moe_mlp_quack", forward_pass, backward_pass)


def moe_mlp_quack(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    activation: str,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    recompute: str = "none",
) -> Tensor:
    """Same value and gradients as `moe_mlp_reference`, by quack's GEMMs.

    Shapes: x (T, D), w_in (E, 2F or F, D), w_out (E, D, F), b_in (E, 2F or F), b_out (E, D) -> (T, D).
    Raises: ConfigError if D or F is no multiple of 8.
    """
    if refused := _width_refuses(*w_out.shape[1:]):
        raise ConfigError(f"experts.backend='quack' cannot run: {refused}")
    return _operator(x, w_in, w_out, routing, activation, b_in, b_out, recompute)
