"""Process groups of a layout, at 512 ranks through torch's group that only pretends to communicate."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, debug
from torch.testing._internal.distributed.fake_pg import FakeStore

from scatterfold.parallel import Layout
from scatterfold.parallel.engines.sharding import places, shard
from scatterfold.parallel.meshes import ALONE
from scatterfold.parallel.plan import ShardingPlan, StackedExperts, cut_parameters
from scatterfold.parallel.shards import local_part, local_range, parts

LAYOUTS = [
    Layout(),
    Layout(dp_shard=512),
    Layout(dp_shard=64),
    Layout(dp_shard=16, ep=8),
    Layout(dp_shard=16, cp=2, tp=4, pp=4, ep=8, etp=2),
    Layout(dp_shard=2, cp=2, tp=4, pp=2, ep=64, etp=2),
    Layout(cp=4, pp=8, ep=2),
    Layout(tp=8, ep=8),
    Layout(tp=512, etp=512),
    Layout(pp=512),
]


@pytest.fixture
def as_rank():
    def start(rank, world):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        debug._clear_python_sharding_prop_cache()  # torch remembers meshes, of the rank that we were before
        debug._clear_fast_path_sharding_prop_cache()

    yield start
    dist.destroy_process_group()


def ranks_of(group):
    return dist.get_process_group_ranks(group)


@pytest.mark.parametrize("rank", [0, 77, 511])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_meshes_are_the_enumerated_groups(as_rank, layout, rank):
    as_rank(rank, 512)
    resolved = layout.resolve(512)
    meshes = resolved.meshes("cpu")
    own = {name: group for name, groups in resolved.groups().items() for group in groups if rank in group}
    found = {}
    for mesh in (meshes.dense, meshes.experts_data, meshes.experts, meshes.tp, meshes.cp, meshes.pp):
        for dim in range(0 if mesh is None else mesh.ndim):
            name = mesh.mesh_dim_names[dim]
            assert mesh.get_local_rank(dim) == own[name].index(rank)
            assert mesh.size(dim) == len(own[name])
            if mesh.size(dim) > 1:
                found[name] = ranks_of(mesh.get_group(dim))
    for name in ("dispatch", "sequence", "stage"):
        group = getattr(meshes, f"{name}_group")
        if group is not None:
            found[name] = ranks_of(group)
            assert dist.get_rank(group) == own[name].index(rank)
    assert found == {name: own[name] for name in found}
    must = {name for name, group in own.items() if len(group) > 1}
    if not meshes.layout.is_folded:  # experts are copied and cut over the very same ranks
        must -= {"edp_replicate", "edp_shard"}
    assert found.keys() == must
    at = meshes.coordinates
    assert meshes.is_data_main == (at.tp == at.cp == 0 and at.pp == resolved.pp - 1)
    assert meshes.data_world == resolved.dp_replicate * resolved.dp_shard


def test_one_process_needs_no_group():
    meshes = Layout().resolve(1).meshes("cpu")
    assert meshes is ALONE
    assert meshes.is_data_main and meshes.data_rank == 0 and meshes.data_world == 1 and not meshes.layout.is_folded


class Stack(nn.Module):
    def __init__(self, experts, width, hidden):
        super().__init__()
        for name, shape in {"w_in": (experts, 2, hidden, width), "b_out": (experts, width)}.items():
            numbers = torch.arange(float(torch.Size(shape).numel())).view(shape)
            self.register_parameter(name, nn.Parameter(numbers))


class Net(nn.Module):
    """A block with experts and a matrix that tensor parallelism cuts, and a scale."""

    def __init__(self, experts=8, rows=8, width=4):
        super().__init__()
        self.block = nn.Module()
        self.block.experts = Stack(experts, width, 4)
        self.block.up = nn.Linear(width, rows, bias=False)
        self.block.up.weight = nn.Parameter(torch.arange(float(rows * width)).view(rows, width))
        self.block.scale = nn.Parameter(torch.arange(6.0))


def spread(layout, world, **sizes):
    from torch.distributed.tensor.parallel import ColwiseParallel

    net, meshes = Net(**sizes), layout.resolve(world).meshes("cpu")
    plan = ShardingPlan(
        units=[net.block],
        experts=[StackedExperts(net.block.experts, {"w_in": -2})],
        tensor_styles={"block.up": ColwiseParallel()},
    )
    cut_parameters(net, plan, meshes)
    at = places(net, plan, meshes, "fp32")
    if meshes.layout.dp_shard > 1:
        shard(net, plan, meshes, at, "fp32", reshard_after_forward=True)
    return net, meshes, at


@pytest.mark.parametrize(
    ("layout", "world", "sizes"),
    [
        (Layout(dp_shard=4), 4, {}),
        (Layout(dp_shard=4), 4, {"experts": 5, "rows": 6}),  # uneven, one shard empty
        (Layout(dp_shard=4, ep=2), 8, {}),
        (Layout(dp_shard=4, ep=2), 4, {"experts": 2}),  # one expert on two ranks: cut over another dimension
        (Layout(dp_shard=2, tp=2), 8, {}),
        (Layout(dp_shard=4, tp=2), 8, {"rows": 6}),  # 3 rows over 4 ranks
        (Layout(dp_shard=2, tp=2, ep=2, etp=2), 8, {}),
        (Layout(dp_shard=4, cp=2, ep=2, etp=2), 8, {}),
        (Layout(tp=4, ep=4), 8, {}),
        (Layout(ep=4, etp=2), 8, {}),
    ],
    ids=str,
)
def test_ranks_hold_every_element_equally_often(as_rank, layout, world, sizes):
    """What a rank holds is what its ranges of indices say, and together the ranks hold everything."""
    whole = dict(Net(**sizes).named_parameters())
    held = {name: torch.zeros(parameter.shape) for name, parameter in whole.items()}
    count = {}
    for rank in range(world):
        as_rank(rank, world)
        net, _, _ = spread(layout, world, **sizes)
        for name, parameter in net.named_parameters():
            assert parameter.shape == whole[name].shape
            ranges = [local_range(parameter, dim) for dim in range(parameter.ndim)]
            indices = tuple(slice(part.start, part.stop) for part in ranges)
            assert torch.equal(local_part(parameter.detach()), whole[name][indices]), name
            held[name][indices] += 1
            count[name] = parts(parameter)
    for name, times in held.items():
        assert times.eq(world / count[name]).all(), name


def test_where_parameters_go(as_rank):
    as_rank(0, 8)
    net, _, at = spread(Layout(dp_shard=2, tp=2, ep=2), 8)
    assert at.experts == {"block.experts.w_in", "block.experts.b_out"}
    assert at.whole == {"block.scale"}  # all tp ranks share it
    assert isinstance(net.block.up.weight, DTensor)
    assert net.block.up.weight.device_mesh.mesh_dim_names == ("dp_replicate", "dp_cp", "tp")
    assert net.block.experts.w_in.device_mesh.mesh_dim_names == ("edp_replicate", "edp_shard", "ep")
