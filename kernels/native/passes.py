"""The two passes of `moe_mlp_native`: what `moe_mlp.cpp` is given, and what it gives back.

Saved for backward as by every backend: x, the pre-activation z (N, 2F) and the routing tables. Temporaries are those of
a piece, rows of one expert. Everything is computed in float32; with bfloat16 inputs, z and results are rounded.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..activations import GATED, is_gated
from ..fused_operator import ExpertLayer, fused_operator
from .build import BuildError, library

KINDS = ("silu", "gelu", "relu", "relu2", "clamped_swish")  # numbers of `Activation` in activations.hpp
PIECE_BYTES = 4 << 20  # of the widest buffer of a piece, in float32
# Backward, where each piece is added to the gradients of its expert's weights, gains by longer ones; bfloat16 needs one
# buffer more.
LONGER_PIECE_BYTES = 10 << 20
LONGEST_PIECE = 1280  # rows


class _Layer(ctypes.Structure):
    """`Layer` of layer.hpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "experts", "width", "hidden", "expert_width", "rows")),
        *((name, ctypes.c_int32) for name in ("activation", "gated", "threads", "has_z")),
        *((name, ctypes.c_void_p) for name in ("x", "w_in", "w_out", "b_in", "b_out", "weight", "token", "offsets")),
        *((name, ctypes.c_void_p) for name in ("z", "out", "grad", "grad_x", "grad_w_in", "grad_w_out")),
        *((name, ctypes.c_void_p) for name in ("grad_b_in", "grad_b_out", "grad_weight")),
    ]


def forward_pass(layer: ExpertLayer, save_z: bool) -> tuple[Tensor, Tensor]:
    """See `fused_operator`."""
    x = layer.x
    z = x.new_empty(layer.token.numel(), layer.w_in.shape[1]) if save_z else x.new_empty(0)
    out = x.new_zeros(layer.num_tokens, x.shape[1], dtype=torch.float32)
    _call(layer, z, backward=False, out=out)
    return out.to(x.dtype), z


def backward_pass(layer: ExpertLayer, grad: Tensor, z: Tensor, needs: list[bool]) -> list[Tensor]:
    """See `fused_operator`."""
    grads = layer.new_gradients([False, *needs[1:5], False])
    for expert in layer.expert_offsets.diff().eq(0).nonzero().flatten().tolist():  # the others are written
        for gradient in grads[1:5]:
            if gradient.numel():
                gradient[expert].zero_()
    x = layer.x
    grad_x = x.new_zeros(layer.num_tokens, x.shape[1], dtype=torch.float32) if needs[0] else None
    grad_weight = torch.zeros(layer.weight.shape, dtype=torch.float32) if needs[5] else None
    names = ("grad_w_in", "grad_w_out", "grad_b_in", "grad_b_out")
    written = {name: gradient for name, gradient in zip(names, grads[1:5]) if gradient.numel()}
    _call(layer, z, backward=True, grad=grad, grad_x=grad_x, grad_weight=grad_weight, **written)
    if grad_x is not None:
        grads[0] = grad_x.to(x.dtype)
    if grad_weight is not None:
        grads[5] = grad_weight.to(layer.weight.dtype)
    return grads


moe_mlp_native = fused_operator("moe_mlp_native", forward_pass, backward_pass)


def _call(layer: ExpertLayer, z: Tensor, backward: bool, **results: Tensor | None) -> None:
    found = library()
    if isinstance(found, BuildError):
        raise found
    experts, width, expert_width = layer.w_out.shape
    hidden = layer.w_in.shape[1]
    if hidden * width * experts == 0 or layer.num_tokens == 0:
        return
    size = LONGER_PIECE_BYTES if backward and layer.x.dtype == torch.float32 else PIECE_BYTES
    rows = max(1, min(LONGEST_PIECE, size // (4 * max(hidden, width)), layer.token.numel()))
    tensors = {
        **{"x": layer.x, "w_in": layer.w_in, "w_out": layer.w_out, "b_in": layer.b_in, "b_out": layer.b_out},
        **{"weight": layer.weight.float(), "token": layer.token, "offsets": layer.expert_offsets},
        **{"z": z if z.numel() else None, **results},
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    given = _Layer(
        tokens=layer.num_tokens,
        experts=experts,
        width=width,
        hidden=hidden,
        expert_width=expert_width,
        rows=rows,
        activation=KINDS.index(GATED.get(layer.activation, layer.activation)),
        gated=is_gated(layer.activation),
        threads=torch.get_num_threads(),
        has_z=z.numel() > 0,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    assert found.scatterfold_layer_bytes() == ctypes.sizeof(_Layer)
    found.scatterfold_moe_mlp(ctypes.byref(given), layer.x.dtype == torch.bfloat16, backward)
