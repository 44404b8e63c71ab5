"""Peers whose kernels need an NVIDIA GPU: ScatterMoE, SonicMoE, MegaBlocks, Liger-Kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..case import Case, Layer, Refused, leaf

HALVES = (torch.bfloat16, torch.float16)


def build_scattermoe(case: Case) -> Layer:
    """`scattermoe.mlp.GLUMLP`: its gate is the second half."""
    _needs_cuda(case)
    from scattermoe.mlp import GLUMLP  # type: ignore[import-not-found]

    shape = case.shape
    with torch.device("meta"):
        mlp = GLUMLP(shape.width, shape.expert_width, shape.experts, shape.top_k, activation=nn.SiLU())
    mlp.experts.weight = nn.Parameter(torch.cat(case.w_in.chunk(2, dim=1)[::-1], dim=1))
    mlp.output_experts.weight = nn.Parameter(case.w_out)
    x, weights = leaf(case.x), leaf(case.weights.to(case.dtype))

    def forward() -> Tensor:
        return mlp(x, weights, case.experts)

    return Layer(forward, x, case.grad, tuple(mlp.parameters()), weights)


def build_sonicmoe(case: Case) -> Layer:
    """`sonicmoe.functional.moe_general_routing_inputs`: gate and up rows alternate, experts are the last dimension."""
    _needs_cuda(case, HALVES)
    from sonicmoe.enums import ActivationType  # type: ignore[import-not-found]
    from sonicmoe.functional import moe_general_routing_inputs  # type: ignore[import-not-found]

    shape = case.shape
    gate, up = case.w_in.chunk(2, dim=1)
    w_in, w_out = leaf(torch.stack((gate, up), dim=2).flatten(1, 2)), leaf(case.w_out)
    x, weights = leaf(case.x), leaf(case.weights.to(case.dtype))
    token = torch.arange(shape.tokens, device=case.device, dtype=torch.int32).repeat_interleave(shape.top_k)

    def forward() -> Tensor:
        out, _ = moe_general_routing_inputs(
            x,
            weights.flatten(),
            token,
            case.experts.flatten().to(torch.int32),
            w_in.permute(1, 2, 0),
            None,
            w_out.permute(1, 2, 0),
            None,
            shape.experts,
            torch.cuda.current_stream(case.device).cuda_stream,
            ActivationType.SWIGLU,
            not torch.is_grad_enabled(),
        )
        return out

    return Layer(forward, x, case.grad, (w_in, w_out), weights)


def build_megablocks(case: Case) -> Layer:
    """`megablocks.layers.dmoe.dMoE` with grouped GEMMs, behind its router."""
    _needs_cuda(case, HALVES)
    from megablocks.layers.arguments import Arguments  # type: ignore[import-not-found]
    from megablocks.layers.dmoe import dMoE  # type: ignore[import-not-found]

    shape = case.shape
    experts = dMoE(
        Arguments(
            hidden_size=shape.width,
            ffn_hidden_size=shape.expert_width,
            moe_num_experts=shape.experts,
            moe_top_k=shape.top_k,
            moe_loss_weight=0,
            activation_fn=nn.functional.silu,
            mlp_type="glu",
            mlp_impl="grouped",
            bias=False,
            return_bias=False,
            fp16=case.dtype == torch.float16,
            bf16=case.dtype == torch.bfloat16,
            device=case.device,
        )
    ).experts
    gate, up = case.w_in.chunk(2, dim=1)
    with torch.no_grad():
        experts.mlp.w1.copy_(gate.flatten(0, 1))
        experts.mlp.v1.copy_(up.flatten(0, 1))
        experts.mlp.w2.copy_(case.w_out.transpose(1, 2).flatten(0, 1))
    x, weights = leaf(case.x), leaf(case.weights.to(case.dtype))
    scores = torch.empty(0, device=case.device)  # read for the balancing loss only

    def forward() -> Tensor:
        return experts(x[None], scores, weights, case.experts)[0]

    return Layer(forward, x, case.grad, tuple(experts.parameters()), weights)


def build_liger(case: Case) -> Layer:
    """`liger_kernel.ops.fused_moe.LigerFusedMoEFunction`: the layout is ours."""
    _needs_cuda(case)
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # type: ignore[import-not-found]

    x, w_in, w_out = leaf(case.x), leaf(case.w_in), leaf(case.w_out)
    weights = leaf(case.weights.to(case.dtype))

    def forward() -> Tensor:
        return LigerFusedMoEFunction.apply(x, w_in, w_out, case.experts.to(torch.int32), weights)  # type: ignore

    return Layer(forward, x, case.grad, (w_in, w_out), weights)


def _needs_cuda(case: Case, dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)) -> None:
    if case.device.type != "cuda":
        raise Refused(f"needs an NVIDIA GPU, this is {case.device.type}")
    if case.dtype not in dtypes:
        raise Refused(f"has no {str(case.dtype).removeprefix('torch.')}")
