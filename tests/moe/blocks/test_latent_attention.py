"""Latent attention against plain loops over heads, queries and keys in float64."""

import math

import pytest
import torch

from scatterfold.kernels.attention import Documents
from scatterfold.moe.blocks import LatentAttention, MultiHeadLatentAttention, RotaryTable, YarnScaling
from scatterfold.moe.blocks.attention import LayerCache

WIDTH, HEADS, ROWS, LENGTH = 12, 3, 2, 7
WIDTHS = {"kv_rank": 10, "nope_width": 6, "rope_width": 4, "value_width": 5}
VARIANTS = {
    "plain": {},
    "queries from a latent": {"q_rank": 8},
    "halves": {"interleaved": False},
    "biases": {"q_rank": 8, "bias": True, "output_bias": True},
    "scaled": {"logit_factor": 1.3},
    "window": {"window": 3},
    "wide norm": {"q_rank": 8, "norm_eps": 0.1},
}
MODULE = ("bias", "output_bias", "logit_factor", "window")
THETA = 50.0


def make(**settings):
    torch.manual_seed(0)
    options = {name: value for name, value in settings.items() if name in MODULE}
    widths = {name: value for name, value in settings.items() if name not in MODULE}
    module = MultiHeadLatentAttention(WIDTH, HEADS, LatentAttention(**WIDTHS, **widths), **options).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.4)
    return module


def rotation(start=0, length=LENGTH):
    return RotaryTable(WIDTHS["rope_width"], THETA, 64)(start, length, torch.device("cpu"))


def inputs():
    return torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def turned(vector, position, interleaved):
    """Each pair of channels as a complex number times exp(i angle)."""
    half = len(vector) // 2
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    out = list(vector)
    for i, (first, second) in enumerate(pairs):
        angle = position * THETA ** (-i / half)
        out[first] = vector[first] * math.cos(angle) - vector[second] * math.sin(angle)
        out[second] = vector[second] * math.cos(angle) + vector[first] * math.sin(angle)
    return torch.stack(out)


def normed(x, norm):
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def loops(module, x, boundaries=(0, LENGTH)):
    """Every head, query and key on its own; one row."""
    s = module.settings
    keys, values, queries = [], [], []
    for position, token in enumerate(x):
        down = module.wkv_down(token)
        latent, shared = normed(down[: s.kv_rank], module.kv_norm), turned(down[s.kv_rank :], position, s.interleaved)
        source = token if module.wq_down is None else normed(module.wq_down(token), module.q_norm)
        for head in range(HEADS):
            own = slice(head * (s.nope_width + s.value_width), (head + 1) * (s.nope_width + s.value_width))
            made = module.wkv.weight[own] @ latent
            keys.append(torch.cat((made[: s.nope_width], shared)))
            values.append(made[s.nope_width :])
            query = module.wq.weight[head * s.query_width : (head + 1) * s.query_width] @ source
            turning = turned(query[s.nope_width :], position, s.interleaved)
            queries.append(torch.cat((query[: s.nope_width], turning)) * module.logit_factor)
    out = []
    for start, end in zip(boundaries, boundaries[1:]):
        for position in range(start, end):
            first = start if module.window is None else max(start, position - module.window + 1)
            heads = []
            for head in range(HEADS):
                seen = range(first * HEADS + head, position * HEADS + head + 1, HEADS)
                scores = torch.stack([queries[position * HEADS + head] @ keys[key] for key in seen])
                weights = (scores / math.sqrt(s.query_width)).softmax(0)
                heads.append(sum(weight * values[key] for weight, key in zip(weights, seen)))
            out.append(module.wo(torch.cat(heads)))
    return torch.stack(out)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_output_and_gradients_equal_plain_loops(name, documents):
    module, x = make(**VARIANTS[name]), inputs().requires_grad_()
    boundaries = (0, 3, LENGTH) if documents else (0, LENGTH)
    cuts = torch.tensor([row * LENGTH + cut for row in range(ROWS) for cut in boundaries[:-1]] + [ROWS * LENGTH])
    out = module(x, rotation(), Documents.of(cuts, ROWS, LENGTH, x.device))
    expected = torch.stack([loops(module, row, boundaries) for row in x])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)  # angles are float32
    leaves = [x, *module.parameters()]
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    for grad, wanted in zip(grads, torch.autograd.grad((expected * weight).sum(), leaves)):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pieces", [[7], [1] * 7, [4, 1, 1, 1], [2, 3, 2]])
@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_through_the_cache_equal_one_pass(name, pieces):
    module, x, cache = make(**VARIANTS[name]), inputs(), LayerCache()
    out = []
    for piece in x.split(pieces, dim=1):
        out.append(module(piece, rotation(cache.length, piece.shape[1]), cache=cache))
    torch.testing.assert_close(torch.cat(out, 1), module(x, rotation()), rtol=1e-9, atol=1e-9)
    assert cache.length == LENGTH


def test_the_cache_holds_latents_only():
    module, cache = make(), LayerCache()
    module(inputs(), rotation(), cache=cache)
    assert cache._keys.shape[2:] == (WIDTHS["kv_rank"],) and cache._values.shape[2:] == (1, WIDTHS["rope_width"])


def test_yarn_scales_the_logits_where_deepseek_does():
    assert YarnScaling(40.0, 4096).latent_factor == 1.0
    scaling = YarnScaling(40.0, 4096, mscale=0.707, mscale_all_dim=0.707)
    assert scaling.latent_factor == pytest.approx((0.1 * 0.707 * math.log(40.0) + 1) ** 2, rel=1e-12)
    assert scaling.magnitude == 1.0
