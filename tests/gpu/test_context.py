"""What context parallelism and activation offload run on a CUDA device, against the same on the CPU or without."""

import pytest
import torch
import torch.distributed as dist

from scatterfold.kernels.attention import attention
from scatterfold.kernels.prefix_attention import Prefixes, prefix_attention
from scatterfold.moe.blocks import MLP
from scatterfold.moe.offload import offloaded
from scatterfold.parallel.context.ring import RingContext

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_prefixes_equal_those_of_the_cpu(dtype, window):
    torch.manual_seed(0)
    queries, keys = torch.tensor([100, 28, 128, 1]), torch.tensor([100, 156, 300, 77])
    q = torch.randn(int(queries.sum()), 4, 64, requires_grad=True)
    k, v = (torch.randn(int(keys.sum()), 2, 64, requires_grad=True) for _ in range(2))
    out = prefix_attention(q, k, v, Prefixes.of(queries, keys, torch.device("cpu")), window)
    wanted = torch.autograd.grad(out.square().sum(), (q, k, v))
    on_gpu = [x.detach().to("cuda", dtype).requires_grad_() for x in (q, k, v)]
    out_gpu = prefix_attention(*on_gpu, Prefixes.of(queries, keys, torch.device("cuda")), window)
    grads = torch.autograd.grad(out_gpu.square().sum(), on_gpu)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
    for got, reference in zip((out_gpu, *grads), (out, *wanted)):
        torch.testing.assert_close(got.cpu().float(), reference, **tolerance)


def test_a_ring_of_one_rank_is_attention(tmp_path):
    """The kernel's operators, called as the ring calls them, with fewer key than query heads."""
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        shapes = (2, 256, 8, 64), (2, 256, 2, 64), (2, 256, 2, 64)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        assert dist.group.WORLD is not None
        out, expected = RingContext(dist.group.WORLD)(q, k, v), attention(q, k, v)
        grads, wanted = (torch.autograd.grad(y.float().square().sum(), (q, k, v)) for y in (out, expected))
        for got, reference in zip((out, *grads), (expected, *wanted)):
            torch.testing.assert_close(got, reference, rtol=2e-2, atol=2e-2)
    finally:
        dist.destroy_process_group()


def test_offload_gives_the_same_gradients_from_less_memory():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(MLP(512, 2048) for _ in range(4))).cuda()
    x = torch.randn(4096, 512, device="cuda", requires_grad=True)
    found = []
    for context in (torch.enable_grad, offloaded):
        before = torch.cuda.memory_allocated()
        with context():
            out = layers(x)
        kept = torch.cuda.memory_allocated() - before
        found.append((kept, torch.autograd.grad(out.square().sum(), [x, *layers.parameters()])))
    (kept, wanted), (kept_offloaded, grads) = found
    assert kept_offloaded < kept / 4
    for got, reference in zip(grads, wanted):
        torch.testing.assert_close(got, reference)
