"""Attention of the last tokens of documents, against plain loops in float64."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from scatterfold.kernels import attention as attention_module
from scatterfold.kernels.prefix_attention import Prefixes, prefix_attention

CPU = torch.device("cpu")
PIECES = {
    "prefixes": ([3, 3, 2, 5], [7, 7, 2, 6]),
    "whole documents": ([4, 4, 1], [4, 4, 1]),
    "one query each": ([1, 1, 1], [1, 5, 9]),
}


def loops(q, k, v, queries, keys, window=None, sinks=None):
    """Every query looks at every key of its piece up to its own, one at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out, group = q.new_zeros(*q.shape[:2], v.shape[2]), q.shape[1] // k.shape[1]
    first_query = first_key = 0
    for num_queries, num_keys in zip(queries, keys):
        for query in range(num_queries):
            own = num_keys - num_queries + query
            first = 0 if window is None else max(0, own - window + 1)
            seen = range(first_key + first, first_key + own + 1)
            for head in range(q.shape[1]):
                scores = torch.stack([q[first_query + query, head] @ k[key, head // group] for key in seen])
                scores = (scores / math.sqrt(q.shape[2])).exp()
                weights = scores / (scores.sum() + (0 if sinks is None else sinks[head].double().exp()))
                out[first_query + query, head] = weights @ v[seen.start : seen.stop, head // group]
        first_query, first_key = first_query + num_queries, first_key + num_keys
    return out


def inputs(queries, keys, heads=4, kv_heads=2, width=8):
    torch.manual_seed(0)
    q = torch.randn(sum(queries), heads, width)
    k, v = torch.randn(2, sum(keys), kv_heads, width).unbind(0)
    return [x.requires_grad_() for x in (q, k, v)]


def prefixes_of(queries, keys):
    return Prefixes.of(torch.tensor(queries), torch.tensor(keys), CPU)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("name", PIECES)
def test_pieces_equal_plain_loops(name, window):
    pieces = PIECES[name]
    q, k, v = inputs(*pieces)
    out = prefix_attention(q, k, v, prefixes_of(*pieces), window)
    reference = loops(q, k, v, *pieces, window)
    torch.testing.assert_close(out.double(), reference, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((reference * weight).sum(), (q, k, v))
    for grad, wanted in zip(grads, expected):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", PIECES)
def test_sinks_and_narrow_values_equal_plain_loops(name, window):
    pieces, sinks = PIECES[name], torch.linspace(-1.0, 3.0, 4).requires_grad_()
    q, k, v = inputs(*pieces)
    v = v[..., :5].detach().requires_grad_()
    out = prefix_attention(q, k, v, prefixes_of(*pieces), window, sinks)
    reference = loops(q, k, v, *pieces, window, sinks)
    torch.testing.assert_close(out.double(), reference, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v, sinks))
    expected = torch.autograd.grad(reference.square().sum(), (q, k, v, sinks))
    for grad, wanted in zip(grads, expected):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_equal_pieces_are_one_call():
    assert prefixes_of(*PIECES["prefixes"]).runs() == [(2, 3, 7), (1, 2, 2), (1, 5, 6)]


class OnGPU(torch.Tensor):
    """A CPU tensor that says that it is on a GPU, to take the paths that GPUs take."""

    is_cuda = True


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", PIECES)
def test_the_flex_path_gives_the_same(monkeypatch, name, window):
    def flex(q, k, v, **options):
        q, k, v = (x.as_subclass(torch.Tensor) for x in (q, k, v))
        return flex_attention(q, k, v, **options)

    monkeypatch.setattr(attention_module, "_compiled_flex", lambda: flex)
    pieces, (q, k, v) = PIECES[name], (x.detach() for x in inputs(*PIECES[name]))
    prefixes = prefixes_of(*pieces)
    out = prefix_attention(q.as_subclass(OnGPU), k, v, prefixes, window)
    torch.testing.assert_close(out.double(), loops(q, k, v, *pieces, window), rtol=1e-5, atol=1e-5)
    sinks = torch.linspace(-1.0, 3.0, 4)
    out = prefix_attention(q.as_subclass(OnGPU), k, v, prefixes, window, sinks)
    torch.testing.assert_close(out.double(), loops(q, k, v, *pieces, window, sinks), rtol=1e-5, atol=1e-5)
    assert prefixes.block_mask(window) is prefixes.block_mask(window)


@pytest.mark.parametrize("window", [None, 3])
def test_the_varlen_path_says_where_queries_and_keys_are(monkeypatch, window):
    pieces = PIECES["prefixes"]

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, -1), enable_gqa=False):
        assert (max_q, max_k) == (5, 7) and window_size[1] == 0 and enable_gqa
        left = window_size[0]
        lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
        return loops(q.float(), k.float(), v.float(), *lengths, None if left < 0 else left + 1).bfloat16()

    monkeypatch.setattr(attention_module, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention_module, "_VARLEN_KEYWORDS", frozenset(["window_size", "enable_gqa"]))
    q, k, v = (x.detach().bfloat16() for x in inputs(*pieces))
    out = prefix_attention(q.as_subclass(OnGPU), k, v, prefixes_of(*pieces), window)
    torch.testing.assert_close(out.double(), loops(q, k, v, *pieces, window), rtol=0.02, atol=0.02)
