"""Attention against plain loops in float64."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from scatterfold.kernels import attention as attention_module
from scatterfold.kernels.attention import Documents, attention


def loops(q, k, v, boundaries, window=None, sinks=None):
    """(T, H, W), (T, G, W), (T, G, V): every query looks at every key of its document before it, one at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    group = q.shape[1] // k.shape[1]
    for start, end in zip(boundaries, boundaries[1:]):
        for head in range(q.shape[1]):
            for query in range(start, end):
                first = start if window is None else max(start, query - window + 1)
                scores = torch.stack(
                    [q[query, head] @ k[key, head // group] / math.sqrt(q.shape[2]) for key in range(first, query + 1)]
                )
                weights = scores.exp() / (scores.exp().sum() + (0 if sinks is None else sinks[head].double().exp()))
                out[query, head] = weights @ v[first : query + 1, head // group]
    return out


def inputs(rows, length, heads=4, kv_heads=2, width=8, dtype=torch.float32, value_width=None):
    torch.manual_seed(0)
    q = torch.randn(rows, length, heads, width, dtype=dtype)
    k, v = torch.randn(2, rows, length, kv_heads, width, dtype=dtype).unbind(0)
    return [x.requires_grad_() for x in (q, k, v[..., :value_width].detach())]


def sinks_of(heads=4):
    return torch.linspace(-1.0, 3.0, heads).requires_grad_()


def flat(x):
    return x.flatten(0, 1)


CASES = {
    "one document a row": [0, 12, 24],
    "long ones": [0, 5, 12, 24],
    "an empty one": [0, 5, 5, 12, 24],
    "many short ones, so that equal lengths are gathered": [0, 3, 4, 7, 8, 11, 12, 15, 16, 19, 20, 23, 24],
    "single tokens": list(range(25)),
}


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("name", CASES)
def test_packed_documents_equal_plain_loops(name, window):
    boundaries = CASES[name]
    q, k, v = inputs(2, 12)
    out = attention(q, k, v, torch.tensor(boundaries, dtype=torch.int32), window)
    reference = loops(flat(q), flat(k), flat(v), boundaries, window)
    torch.testing.assert_close(flat(out).double(), reference, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((reference * flat(weight)).sum(), (q, k, v))
    for grad, wanted in zip(grads, expected):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value_width", [8, 5])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(
    "name", ["one document a row", "an empty one", "many short ones, so that equal lengths are gathered"]
)
def test_sinks_and_narrow_values_equal_plain_loops(name, window, value_width):
    boundaries, sinks = CASES[name], sinks_of()
    q, k, v = inputs(2, 12, value_width=value_width)
    out = attention(q, k, v, torch.tensor(boundaries, dtype=torch.int32), window, sinks)
    reference = loops(flat(q), flat(k), flat(v), boundaries, window, sinks)
    torch.testing.assert_close(flat(out).double(), reference, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v, sinks))
    expected = torch.autograd.grad((reference * flat(weight)).sum(), (q, k, v, sinks))
    for grad, wanted in zip(grads, expected):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_sinks_in_half_precision():
    q, k, v = inputs(2, 12, dtype=torch.bfloat16)
    out = attention(q, k, v, None, 5, sinks_of())
    assert out.dtype == torch.bfloat16
    reference = loops(flat(q), flat(k), flat(v), [0, 12, 24], 5, sinks_of())
    torch.testing.assert_close(flat(out).double(), reference, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_grouped_queries_share_their_keys(heads, kv_heads):
    q, k, v = inputs(2, 7, heads, kv_heads)
    out = attention(q, k, v)
    reference = loops(flat(q), flat(k), flat(v), [0, 7, 14])
    torch.testing.assert_close(flat(out).double(), reference, rtol=1e-5, atol=1e-5)


def test_a_permutation_is_made_only_where_it_saves_calls():
    of = attention_module._Plan.of
    assert of(torch.tensor([5, 7, 12])).runs == [(1, 5), (1, 7), (1, 12)]
    assert of(torch.tensor([5, 7, 12])).order is None
    assert of(torch.tensor([8, 8, 8, 5, 3])).order is None
    assert of(torch.tensor([8, 8, 8, 5, 3])).runs == [(3, 8), (1, 5), (1, 3)]
    alternating = of(torch.tensor([1, 3, 1, 3, 1, 3]))
    assert alternating.runs == [(3, 1), (3, 3)]
    assert alternating.order.tolist() == [0, 4, 8, 1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert alternating.order[alternating.restore].tolist() == list(range(12))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("new", [1, 4])
def test_new_tokens_after_a_past_see_what_they_saw_in_one_pass(new, window):
    q, k, v = inputs(2, 10, value_width=5)
    for sinks in (None, sinks_of()):
        whole = attention(q, k, v, window=window, sinks=sinks)
        torch.testing.assert_close(attention(q[:, -new:], k, v, window=window, sinks=sinks), whole[:, -new:])


def test_boundaries_that_do_not_fit_are_refused():
    q, k, v = inputs(1, 10)
    with pytest.raises(ValueError, match="ends at 9, the batch has 10"):
        attention(q, k, v, torch.tensor([0, 4, 9]))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 4])
def test_the_flex_path_gives_the_same(monkeypatch, window):
    monkeypatch.setattr(attention_module, "_compiled_flex", lambda: flex_attention)
    boundaries = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    q, k, v = (x.detach() for x in inputs(2, 12))
    documents = Documents.of(boundaries, 2, 12, q.device)
    out = attention_module._flex(flat(q), flat(k), flat(v), documents.block_mask(window))
    torch.testing.assert_close(out, flat(attention(q, k, v, boundaries, window)), rtol=1e-5, atol=1e-5)
    assert documents.block_mask(window) is documents.block_mask(window)
    out = attention_module._flex(flat(q), flat(k), flat(v), documents.block_mask(window), sinks_of())
    torch.testing.assert_close(out, flat(attention(q, k, v, boundaries, window, sinks_of())), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keywords", [("window_size", "enable_gqa"), ("window_size",), ("is_causal",)])
@pytest.mark.parametrize("window", [None, 4])
def test_the_varlen_path_speaks_each_torch_version(monkeypatch, keywords, window):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        assert set(options) <= set(keywords)
        assert k.shape[1] == q.shape[1] or options.get("enable_gqa")
        assert max_q >= int(cu_q.diff().max())
        left, right = options.get("window_size", (-1, 0))
        assert right == 0 and options.get("is_causal", True)
        return loops(q, k, v, cu_q.tolist(), None if left < 0 else left + 1).float()

    monkeypatch.setattr(attention_module, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention_module, "_VARLEN_KEYWORDS", frozenset(keywords))
    if not attention_module._varlen_serves(window):
        assert window is not None and keywords == ("is_causal",)
        return
    boundaries = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    q, k, v = (x.detach() for x in inputs(2, 12))
    documents = Documents.of(boundaries, 2, 12, q.device)
    out = attention_module._varlen(flat(q), flat(k), flat(v), documents, window)
    torch.testing.assert_close(out, flat(attention(q, k, v, boundaries, window)), rtol=1e-5, atol=1e-5)


def test_the_installed_torch_has_a_varlen_attention_that_can_be_causal():
    assert attention_module._varlen_serves(None)
