"""Tensor and sequence parallelism: loss and gradients of one process, from real ranks over gloo."""

import sys
from pathlib import Path

import cut_models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor

from scatterfold import ConfigError, ModelConfig, Transformer
from scatterfold.kernels.cross_entropy import linear_cross_entropy
from scatterfold.moe.models.config import check_tensor_parallel
from scatterfold.parallel import Layout
from scatterfold.parallel.meshes import Meshes
from scatterfold.parallel.process import running
from scatterfold.parallel.tensor.vocabulary import embed, parallel_linear_cross_entropy

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def run_in_ranks(folder, *layouts):
    with running("cpu", timeout_s=60) as process:
        cut_models.write(process, folder, *layouts)
        check_functions(process)
        (Path(folder) / f"functions-{process.world}-{process.rank}").touch()


def check_functions(process):
    """The parts that need no model, in float64 against torch's own functions on the whole."""
    mesh = Layout(tp=process.world).resolve(process.world).meshes("cpu").tp
    for vocabulary in (13, 16, process.world - 1):
        check_embedding(mesh, vocabulary)
        for chunk_elements in (1, 24, 2**20):
            check_cross_entropy(mesh, vocabulary, chunk_elements)
    check_half_precision(mesh)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(whole, mesh):
    return whole.chunk(mesh.size(), 1)[mesh.get_local_rank()].detach().clone().requires_grad_()


def cut_table(whole, mesh):
    return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None).requires_grad_()


def check_embedding(mesh, vocabulary):
    tokens = torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(1))
    whole, grad = random(vocabulary, 3).requires_grad_(), random(2, 8, 3, seed=2)
    table = cut_table(whole.detach(), mesh)
    out = embed(tokens, table, mesh.get_group())
    expected = F.embedding(tokens, whole)
    torch.testing.assert_close(out, part(expected, mesh).detach(), rtol=0, atol=0)
    out.backward(part(grad, mesh).detach())
    expected.backward(grad)
    torch.testing.assert_close(table.grad.full_tensor(), whole.grad)


def check_cross_entropy(mesh, vocabulary, chunk_elements):
    whole = random(2, 8, 3).requires_grad_()
    weight = random(vocabulary, 3, seed=1).mul_(30).requires_grad_()  # some probabilities vanish
    labels = torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(3))
    labels[0, 2:5] = -100
    hidden, table = part(whole, mesh), cut_table(weight.detach(), mesh)
    loss = parallel_linear_cross_entropy(hidden, table, labels, mesh.get_group(), chunk_elements)
    expected = F.cross_entropy((whole @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    (loss * 0.7).backward()
    (expected * 0.7).backward()
    torch.testing.assert_close(hidden.grad, part(whole.grad, mesh).detach())
    torch.testing.assert_close(table.grad.full_tensor(), weight.grad)
    with torch.no_grad():
        assert torch.equal(parallel_linear_cross_entropy(hidden, table, labels, mesh.get_group(), chunk_elements), loss)


def check_half_precision(mesh):
    """Under autocast, the same bits go into the products as in one process."""
    whole, weight = random(2, 8, 16).float(), random(32, 16, seed=1).float()
    labels = torch.arange(16).view(2, 8)
    alone = [whole.clone().requires_grad_(), weight.clone().requires_grad_()]
    hidden, table = part(whole, mesh), cut_table(weight.clone(), mesh)
    with torch.autocast("cpu", torch.bfloat16):
        loss = parallel_linear_cross_entropy(hidden, table, labels, mesh.get_group())
        expected = linear_cross_entropy(alone[0].flatten(0, 1), alone[1], labels.flatten())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(hidden.grad, part(alone[0].grad, mesh).detach(), rtol=0.02, atol=0.01)
    torch.testing.assert_close(table.grad.full_tensor(), alone[1].grad, rtol=0.02, atol=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("tensor")
    run_ranks(2, __file__, "run_in_ranks", folder, "tp2")
    run_ranks(4, __file__, "run_in_ranks", folder, "tp4", "cp2_tp2")
    return folder


@pytest.mark.parametrize(
    ("layout", "case"), [(layout, case) for layout in ("tp2", "tp4", "cp2_tp2") for case in cut_models.cases_of(layout)]
)
def test_cut_over_heads_channels_and_vocabulary(folder, layout, case):
    found = torch.load(folder / f"{layout}.pt")[case]
    cut_models.assert_same(found, cut_models.alone(cut_models.cases_of(layout)[case]))


@pytest.mark.parametrize("world", [2, 4])
def test_embedding_and_cross_entropy_over_a_cut_vocabulary(folder, world):
    """The ranks have compared, and failed if something differed."""
    assert len(list(folder.glob(f"functions-{world}-*"))) == world


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 6}, "layout.tp=4 does not divide model.heads=6"),
        ({"kv_heads": 2}, "layout.tp=4 does not divide model.kv_heads=2"),
        ({"ffn_width": 30}, "layout.tp=4 does not divide model.ffn_width=30"),
        ({"shared_expert_width": 6}, "layout.tp=4 does not divide model.shared_expert_width=6"),
    ],
)
def test_what_ranks_cannot_share_evenly_is_refused(settings, message):
    shape = {"vocab_size": 30, "layers": 1, "width": 24, "heads": 8, "head_width": 4, "ffn_width": 8}
    with pytest.raises(ConfigError, match=message):
        check_tensor_parallel(ModelConfig(**shape | settings), 4)


def test_there_are_no_logits_of_a_cut_vocabulary():
    shape = {"vocab_size": 30, "layers": 1, "width": 16, "heads": 2, "ffn_width": 8}
    model = Transformer(ModelConfig(**shape), meshes=Meshes(sequence_group=dist.GroupMember.NON_GROUP_MEMBER))
    with pytest.raises(ConfigError, match="has no whole logits"):
        model.logits(torch.zeros(1, 1, 16))


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
