"""Initial values of a sharded model, as one rank of several sees them."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from scatterfold import Experts, ModelConfig, TopKRouter, Transformer


def build():
    config = ModelConfig(vocab_size=10, layers=2, width=16, heads=4, num_experts=3, expert_width=8, qk_norm="head")
    return Transformer(config, lambda: TopKRouter(16, 3, 2), lambda: Experts(3, 16, 8), seed=5)


def test_a_rank_holds_its_shard_of_the_same_model():
    rank = 2
    whole = dict(build().named_parameters())
    dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,))
        with torch.device("meta"):
            model = build()
        for block in model.sharding_units():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        model.reset_parameters(5)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
            rows = torch.chunk(whole[name], 4)
            expected = rows[rank] if rank < len(rows) else whole[name][:0]
            assert torch.equal(parameter.to_local(), expected), name
    finally:
        dist.destroy_process_group()
