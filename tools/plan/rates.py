"""How fast a rank computes at the shapes of a configuration, forward and backward."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels import Routing, is_gated, moe_mlp
from ...kernels.attention import attention
from ...kernels.cross_entropy import linear_cross_entropy
from ...moe.estimate import Job
from ...moe.estimate.devices import Rates

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Clock:
    """Times calls on a device, ranks side by side.

    Args:
        seconds: to spend on one figure, after two calls to warm up; at least three calls.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def __call__(self, call: Callable[[], object]) -> float:
        """The median in seconds. Ranks of a group call as often as each other, where the calls communicate."""
        for _ in range(2):
            call()
        first = self._once(call)
        count = min(max(3, int(self.seconds / max(first, 1e-6))), 200)
        if dist.is_initialized():
            agreed = torch.tensor([count], device=self.device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
            count = int(agreed)
        return statistics.median(self._once(call) for _ in range(count))

    def _once(self, call: Callable[[], object]) -> float:
        self._finish()
        start = time.perf_counter()
        call()
        self._finish()
        return time.perf_counter() - start

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak(clock: Clock, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product."""
    size = 8192 if clock.device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / clock(lambda: a @ b)


def bandwidth(clock: Clock) -> float:
    """Bytes per second of c = a + b on arrays far larger than caches: two are read and one is written."""
    size = 2**28 if clock.device.type == "cuda" else 2**24
    a, b, c = (torch.ones(size, device=clock.device) for _ in range(3))
    return 12.0 * size / clock(lambda: torch.add(a, b, out=c))


def rates(job: Job, clock: Clock, precision: str) -> Rates:
    """FLOP/s of the parts of a layer, and of the head, for one micro-batch of a job."""
    dtype, config = DTYPES[precision], job.workload.config
    tokens, device = job.tokens, clock.device
    width, queries = config.width, config.heads * config.head_size

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    x, w = values(tokens, width), values(queries, width)
    dense = 6.0 * tokens * width * queries / clock(_both(lambda: torch.nn.functional.linear(x, w)))
    length = job.workload.plan.data.sequence_length
    q = values(tokens // length, length, config.heads, config.head_size)
    k, v = (values(tokens // length, length, config.num_kv_heads, config.head_size) for _ in range(2))
    seen = (length + 1) / 2
    attending = 12.0 * tokens * queries * seen / clock(_both(lambda: attention(q, k, v)))
    head = torch.randn(config.vocab_size, width, device=device).requires_grad_()
    labels = torch.randint(0, config.vocab_size, (tokens,), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()

    def loss() -> Tensor:
        with autocast:
            return linear_cross_entropy(x, head, labels)

    of_head = 6.0 * tokens * width * config.vocab_size / clock(_both(loss))
    return Rates(dense, _experts(job, clock, dtype) or dense, attending, of_head)


def _experts(job: Job, clock: Clock, dtype: torch.dtype) -> float | None:
    """Of all experts of a layer with K of them a token at random; None for a dense model."""
    load, config = job.workload, job.workload.config
    if not load.plan.model.is_moe:
        return None
    tokens, experts, hidden = job.tokens, config.num_experts, config.expert_width or 0
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, : load.experts_per_token]
    weights = torch.full(chosen.shape, 1.0 / load.experts_per_token, device=clock.device)
    matrices = 3 if is_gated(load.expert_activation) else 2
    x, w_in, w_out = (
        torch.randn(*shape, device=clock.device).mul_(0.02).to(dtype).requires_grad_()
        for shape in ((tokens, config.width), (experts, (matrices - 1) * hidden, config.width))
        + ((experts, config.width, hidden),)
    )
    routing = Routing.from_topk(chosen.to(clock.device), weights, experts)
    # A leaf: one table serves all calls, but the graph that leads to its weights only the first backward pass.
    routing = replace(routing, weight=routing.weight.detach().requires_grad_())
    flops = 6.0 * chosen.numel() * config.width * matrices * hidden
    return flops / clock(_both(lambda: moe_mlp(x, w_in, w_out, routing, load.expert_activation)))


def _both(forward: Callable[[], Tensor]) -> Callable[[], None]:
    """A forward and a backward pass; gradients are forgotten, as `zero_grad` does."""

    def call() -> None:
        out = forward()
        leaves = [leaf for leaf in _leaves(out) if leaf.requires_grad]
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return call


def _leaves(out: Tensor) -> list[Tensor]:
    """The tensors without history that an output comes from."""
    found, nodes, seen = [], [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)  # type: ignore[reportAttributeAccessIssue]
        nodes.extend(following for following, _ in node.next_functions)
    return found
