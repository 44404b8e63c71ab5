"""`moe_mlp` with parameters that FSDP2 shards: gathered for the pass, freed, gathered again, reduced."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from scatterfold.kernels import Routing, moe_mlp

WIDTH, EXPERT_WIDTH, EXPERTS, TOKENS, RANKS = 8, 8, 3, 10, 2  # 3 experts do not divide by 2 ranks
CASES = [("cpu", "none"), ("cpu", "all"), ("torch", "none"), ("torch", "all")]


class Layer(nn.Module):
    def __init__(self, backend, recompute):
        super().__init__()
        torch.manual_seed(0)
        self.backend, self.recompute = backend, recompute
        self.w_in = nn.Parameter(torch.randn(EXPERTS, 2 * EXPERT_WIDTH, WIDTH))
        self.w_out = nn.Parameter(torch.randn(EXPERTS, WIDTH, EXPERT_WIDTH))
        self.b_in = nn.Parameter(torch.randn(EXPERTS, 2 * EXPERT_WIDTH))
        self.b_out = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x, chosen, weights):
        routing = Routing.from_topk(chosen, weights, EXPERTS)
        biases = {"b_in": self.b_in, "b_out": self.b_out}
        return moe_mlp(
            x, self.w_in, self.w_out, routing, backend=self.backend, recompute=self.recompute, **biases
        )  # fmt: skip


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    chosen = torch.rand(TOKENS, EXPERTS, generator=generator).topk(2).indices
    return torch.randn(TOKENS, WIDTH, generator=generator), chosen, torch.rand(TOKENS, 2, generator=generator)


def gradients_of_one_process(backend, recompute, dtype):
    layer = Layer(backend, recompute).to(dtype)
    for rank in range(RANKS):
        x, chosen, weights = batch(rank)
        layer(x.to(dtype), chosen, weights).float().square().sum().backward()
    return {name: p.grad.float() / RANKS for name, p in layer.named_parameters()}


def learn_sharded():
    torch.distributed.init_process_group("gloo")
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (RANKS,))
    for backend, recompute in CASES:
        for dtype, compiled in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
            layer = Layer(backend, recompute)
            fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
            if compiled:
                layer.compile(backend="aot_eager")
            layer(*batch(rank)).float().square().sum().backward()
            expected = gradients_of_one_process(backend, recompute, dtype)
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # ranks are summed in float32, or in bfloat16
            for name, parameter in layer.named_parameters():
                assert isinstance(parameter, DTensor)
                found = parameter.grad.full_tensor()
                assert (found - expected[name]).norm() <= tolerance * expected[name].norm(), (backend, dtype, name)
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_sharded_parameters_get_the_gradients_of_one_process(run_ranks):
    run_ranks(RANKS, Path(__file__), "learn_sharded")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
