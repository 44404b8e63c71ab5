"""Attention on a CUDA device: varlen_attn in half precision, FlexAttention in float32, against the CPU."""

import pytest
import torch

from scatterfold.kernels.attention import attention


def inputs(rows, length, heads, kv_heads, width):
    torch.manual_seed(0)
    q = torch.randn(rows, length, heads, width)
    k, v = torch.randn(2, rows, length, kv_heads, width).unbind(0)
    return [x.requires_grad_() for x in (q, k, v)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("sinks", [False, True])
def test_cuda_equals_cpu(dtype, window, sinks):
    boundaries = torch.tensor([0, 100, 256, 300, 512], dtype=torch.int32)
    for cu_seqlens in (None, boundaries):
        q, k, v = inputs(2, 256, 4, 2, 64)
        leaves = [q, k, v, *([torch.linspace(-1.0, 3.0, 4).requires_grad_()] if sinks else [])]
        out = attention(q, k, v, cu_seqlens, window, *leaves[3:])
        wanted = torch.autograd.grad(out.square().sum(), leaves)
        on_gpu = [x.detach().to("cuda", torch.float32 if x.ndim == 1 else dtype).requires_grad_() for x in leaves]
        out_gpu = attention(*on_gpu[:3], cu_seqlens, window, *on_gpu[3:])
        grads = torch.autograd.grad(out_gpu.square().sum(), on_gpu)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
        for got, reference in zip((out_gpu, *grads), (out, *wanted)):
            torch.testing.assert_close(got.cpu().float(), reference, **tolerance)
