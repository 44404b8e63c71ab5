"""Context parallelism: loss and gradients of one process, from real ranks over gloo."""

import sys
from pathlib import Path

import cut_models
import pytest
import torch

from scatterfold.kernels.attention import attention
from scatterfold.parallel import Layout
from scatterfold.parallel.context import ring
from scatterfold.parallel.context.attention import GatheredContext
from scatterfold.parallel.context.zigzag import own_part, to_rank_order
from scatterfold.parallel.process import running
from scatterfold.parallel.tensor.collectives import gather_rows

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def run_in_ranks(folder, layout):
    with running("cpu", timeout_s=60) as process:
        cut_models.write(process, folder, layout)
        check_attention(process)
        (Path(folder) / f"attention-{process.world}-{process.rank}").touch()


def check_attention(process):
    """Attention alone, gathered and by ring, in float64 against the whole sequence in one call."""
    cp = process.world
    group = Layout(cp=cp).resolve(cp).meshes("cpu").cp.get_group()
    rows, length = 3, 8 * cp
    cuts = {
        "rows": None,
        "few": [0, length, 2 * length - 3, 2 * length, 3 * length],
        "many": sorted({0, *range(1, 2 * length, 3), length, 2 * length, 3 * length}),
        "singles": list(range(3 * length + 1)),
    }
    for cu_seqlens in (None if ends is None else torch.tensor(ends, dtype=torch.int32) for ends in cuts.values()):
        for window in (None, 1, 5, 100):
            place = GatheredContext.of(cu_seqlens, rows, length, group, torch.device("cpu"), window)
            compare(process, group, place, heads=4, kv_heads=2, cu_seqlens=cu_seqlens, window=window)
    ring._forward, ring._backward = plain_forward, plain_backward
    compare(process, group, ring.RingContext(group), heads=4, kv_heads=2, atol=1e-5)  # it adds in float32


def compare(process, group, place, heads, kv_heads, cu_seqlens=None, window=None, rows=3, atol=1e-12):
    cp, rank = process.world, process.rank
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads)
    whole = [torch.randn(rows, 8 * cp, n, 4, generator=generator, dtype=torch.float64) for n in sizes]
    grad = torch.randn(rows, 8 * cp, heads, 4, generator=generator, dtype=torch.float64)
    own = [own_part(x, 1, cp, rank).clone().requires_grad_() for x in whole]
    whole = [x.requires_grad_() for x in whole]
    expected = attention(*whole, cu_seqlens, window)
    out = place(*own)
    torch.testing.assert_close(out, own_part(expected, 1, cp, rank), rtol=0, atol=atol)
    out.backward(own_part(grad, 1, cp, rank))
    expected.backward(grad)
    for here, there in zip(own, whole):
        torch.testing.assert_close(here.grad, own_part(there.grad, 1, cp, rank), rtol=0, atol=atol)
    gathered = gather_rows(out.detach().transpose(0, 1), group).transpose(0, 1)
    torch.testing.assert_close(gathered, to_rank_order(expected.detach(), 1, cp), rtol=0, atol=atol)


def scores_of(q, k, is_causal):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf) if is_causal else scores


def spread(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def plain_forward(q, k, v, is_causal):
    """In place of the kernel for GPUs: attention of two blocks (B, H, S, W), and its log-sum-exp."""
    scores = scores_of(q, spread(k, q), is_causal)
    return scores.softmax(-1) @ spread(v, q), scores.logsumexp(-1)


def plain_backward(*, grad_out, query, key, value, out, logsumexp, is_causal, random):
    probs = (scores_of(query, spread(key, query), is_causal) - logsumexp.unsqueeze(-1)).exp()
    grad_scores = probs * (grad_out @ spread(value, query).transpose(-1, -2) - (grad_out * out).sum(-1, keepdim=True))
    grad_scores = grad_scores * query.shape[-1] ** -0.5
    grad_query = grad_scores @ spread(key, query)
    of_heads = grad_scores.transpose(-1, -2) @ query, probs.transpose(-1, -2) @ grad_out
    return grad_query, *(grad.unflatten(1, (key.shape[1], -1)).sum(2) for grad in of_heads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_ranks):
    folder = tmp_path_factory.mktemp("context")
    run_ranks(2, __file__, "run_in_ranks", folder, "cp2")
    run_ranks(4, __file__, "run_in_ranks", folder, "cp4")
    return folder


@pytest.mark.parametrize(
    ("layout", "case"), [(layout, case) for layout in ("cp2", "cp4") for case in cut_models.cases_of(layout)]
)
def test_cut_over_sequences(folder, layout, case):
    found = torch.load(folder / f"{layout}.pt")[case]
    cut_models.assert_same(found, cut_models.alone(cut_models.cases_of(layout)[case]))


@pytest.mark.parametrize("world", [2, 4])
def test_attention_over_cut_sequences(folder, world):
    """The ranks have compared, and failed if something differed."""
    assert len(list(folder.glob(f"attention-{world}-*"))) == world


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
