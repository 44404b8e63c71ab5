"""`quack.gemm_interface` of quack-kernels 0.6.5 in plain loops: its signatures and documented semantics, in float64.

It refuses what the kernels refuse (strides, alignment, devices aside), and leaves NaN wherever they would not write.
test_quack_backend.py compares the signatures with the installed package.
"""

from enum import IntEnum

import torch
from torch import Tensor

calls: list[str] = []


def silu(x):
    s = x.sigmoid()
    return x * s, s * (1 + x * (1 - s))


def relu(x):
    return x.clamp_min(0), (x > 0).double()


def relu_sq(x):
    return x.clamp_min(0).square(), 2 * x.clamp_min(0)


GATES = {"swiglu": silu, "reglu": relu}  # value and derivative
PLAIN = {"silu": silu, "relu": relu, "relu_sq": relu_sq}


class SplitKMode(IntEnum):
    SERIAL = 0


class RoundingMode(IntEnum):
    RN = 0


def gemm(
    A,
    B,
    out=None,
    bias=None,
    alpha=1.0,
    out_dtype=None,
    out_quant_dim=-1,
    out_transposed=False,
    out_per_tensor_scale=None,
    cu_seqlens_m=None,
    cu_seqlens_k=None,
    A_idx=None,
    batch_idx_permute=None,
    dynamic_scheduler=False,
    tuned=True,
    rounding_mode=RoundingMode.RN,
    sr_seed=0,
    concat_layout=None,
    split_k=1,
    split_k_mode=SplitKMode.SERIAL,
):
    calls.append("gemm")
    assert not tuned and not dynamic_scheduler
    if cu_seqlens_m is not None:
        return _rows(A, B, bias, cu_seqlens_m, A_idx, concat_layout).to(A.dtype)
    # varlen_k: A (M, total or any), B (total, N) -> (L, M, N)
    assert cu_seqlens_k.dtype == torch.int32 and bias is None
    assert A.stride(0) == 1 and B.stride(1) == 1 and A.dtype == B.dtype
    assert B.numel() or not A.numel()  # a launch on empty rows
    _check_index(A_idx, A.shape[1])
    experts = cu_seqlens_k.numel() - 1
    if out is None:
        out = A.new_full((experts, A.shape[0], B.shape[1]), torch.nan)
    assert out.shape == (experts, A.shape[0], B.shape[1])
    for expert, (start, end) in enumerate(_bounds(cu_seqlens_k)):
        columns = A[:, start:end] if A_idx is None else A[:, A_idx[start:end]]
        result = columns.double() @ B[start:end].double()
        if concat_layout and "out" in concat_layout:
            dim = 0 if out.stride(2) == 1 else 1  # the one that is not contiguous
            result = _de_interleave(result, dim)
        out[expert] = result
    return out


def gemm_act(
    A,
    B,
    C=None,
    bias=None,
    activation=None,
    alpha=1.0,
    preact_out=None,
    postact_out=None,
    out_dtype=None,
    postact_dtype=None,
    cu_seqlens_m=None,
    A_idx=None,
    store_preact=True,
    dynamic_scheduler=False,
    tuned=True,
    config=None,
    concat_layout=None,
    split_k=1,
    split_k_mode=SplitKMode.SERIAL,
):
    calls.append("gemm_act")
    assert not tuned and not dynamic_scheduler
    z = _rows(A, B, bias, cu_seqlens_m, A_idx, concat_layout if activation in GATES else None)
    return z.to(A.dtype) if store_preact else None, _activate(activation, z).to(A.dtype)


def gemm_dact(
    A,
    B,
    PreAct,
    activation=None,
    dx_out=None,
    postact_out=None,
    out_dtype=None,
    postact_dtype=None,
    colvec_scale=None,
    colvec_reduce=False,
    cu_seqlens_m=None,
    A_idx=None,
    dynamic_scheduler=True,
    tuned=True,
    config=None,
    split_k=1,
    split_k_mode=SplitKMode.SERIAL,
):
    calls.append("gemm_dact")
    assert not tuned and not dynamic_scheduler
    assert PreAct.is_contiguous() and colvec_scale.dtype == torch.float32
    dout = _rows(A, B, None, cu_seqlens_m, A_idx, None)
    scale = colvec_scale.double()[:, None]
    z = PreAct.double()
    a = _activate(activation, z)
    if activation in GATES:
        value, slope = GATES[activation](z[:, ::2])
        dz = torch.stack([slope * z[:, 1::2], value], 2) * (dout * scale)[:, :, None]
        dz = dz.flatten(1)
    else:
        dz = PLAIN[activation](z)[1] * dout * scale
    inner = (a * dout).sum(1).float()
    return dz.to(A.dtype), (a * scale).to(A.dtype), *((inner,) if colvec_reduce else ())


gemm_gated, gemm_dgated = gemm_act, gemm_dact


def _rows(A, B, bias, offsets, index, concat) -> Tensor:
    """varlen_m: A (total or any, K), B (L, K, N), bias (L, N) -> (total, N) in float64."""
    assert offsets.dtype == torch.int32 and offsets.is_contiguous()
    assert A.dim() == 2 and A.stride(1) == 1 and B.dim() == 3 and 1 in B.stride()[1:] and A.dtype == B.dtype
    assert A.shape[1] % 8 == 0 and B.shape[2] % 8 == 0 and A.dtype in (torch.bfloat16, torch.float16)
    _check_index(index, A.shape[0])
    out = torch.full((len(A if index is None else index), B.shape[2]), torch.nan, dtype=torch.float64)
    for expert, (start, end) in enumerate(_bounds(offsets)):
        w = B[expert]
        if concat and "B" in concat:
            w = _interleave(w, 0 if w.stride(1) == 1 else 1)
        rows = A[start:end] if index is None else A[index[start:end]]
        out[start:end] = rows.double() @ w.double()
        if bias is not None:
            own = bias[expert]
            out[start:end] += _interleave(own, 0) if concat and "bias" in concat else own
    return out


def _activate(name, z):
    return GATES[name](z[:, ::2])[0] * z[:, 1::2] if name in GATES else PLAIN[name](z)[0]


def _interleave(t, dim):
    return torch.stack(t.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def _de_interleave(t, dim):
    return torch.cat([t.unflatten(dim, (-1, 2)).select(dim + 1, half) for half in (0, 1)], dim)


def _bounds(offsets):
    bounds = offsets.tolist()
    return list(zip(bounds, bounds[1:]))


def _check_index(index, size):
    assert index is None or (index.dtype == torch.int32 and bool(((index >= 0) & (index < size)).all()))
