"""The parts of a transformer, each against its formula."""

import pytest
import torch

from scatterfold import ConfigError, Experts, MoELayer, TopKRouter
from scatterfold.moe.blocks import (
    MLP,
    Attention,
    Block,
    GatedMLP,
    LinearScaling,
    Llama3Scaling,
    RMSNorm,
    RotaryTable,
    YarnScaling,
)
from scatterfold.moe.blocks.attention import LayerCache
from scatterfold.moe.context import ALONE

CPU = torch.device("cpu")


def test_rotation_multiplies_pairs_of_channels_by_a_complex_phase():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8)
    turned = RotaryTable(8, 100.0, max_positions=20)(7, 5, CPU)(x)
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    angle = torch.arange(7, 12, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    expected = pairs * torch.polar(torch.ones_like(angle), angle)[:, None, :]
    torch.testing.assert_close(turned.double(), torch.cat((expected.real, expected.imag), -1), rtol=1e-5, atol=1e-6)


def test_scores_depend_on_distances_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 5, 1, 8).unbind(0)
    table = RotaryTable(8, 10000.0, max_positions=2000)
    near, far = table(0, 5, CPU), table(1500, 5, CPU)
    scores = [torch.einsum("bqhw,bkhw->qk", rotation(q), rotation(k)) for rotation in (near, far)]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-4)


def test_a_table_keeps_the_dtype_of_what_it_turns_and_is_made_once():
    table = RotaryTable(8, 10000.0, max_positions=16)
    assert table(0, 4, CPU)(torch.ones(1, 4, 1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert table(0, 4, CPU).cos.data_ptr() == table(0, 9, CPU).cos.data_ptr()


def test_scalings_leave_fast_channels_and_slow_slow_ones_down():
    plain = RotaryTable(64, 10000.0, 16).frequencies()
    for scaling in (Llama3Scaling(8.0, 256), YarnScaling(8.0, 256)):
        ratio = RotaryTable(64, 10000.0, 16, scaling).frequencies() / plain
        assert ratio[0] == 1.0
        assert ratio[-1].item() == pytest.approx(1 / 8)
        assert (ratio.diff() <= 1e-12).all()
    assert torch.equal(RotaryTable(64, 10000.0, 16, LinearScaling(2.0)).frequencies(), plain / 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(0.5), "rope_scaling.factor=0.5 is out of range"),
        (lambda: Llama3Scaling(2.0, 0), "original_positions=0 is too small"),
        (lambda: Llama3Scaling(2.0, 16, 4.0, 1.0), "low_freq_factor=4.0 is out of range"),
        (lambda: YarnScaling(2.0, 16, beta_slow=40.0), "beta_slow=40.0 is out of range"),
    ],
)
def test_impossible_scalings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_norm_gives_the_autocast_dtype():
    norm = RMSNorm(8)
    x = torch.randn(2, 8)
    assert norm(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2"])
def test_equal_experts_whose_weights_sum_to_one_are_the_dense_mlp(activation):
    torch.manual_seed(0)
    mlp, experts = MLP(8, 12, activation), Experts(4, 8, 12, activation)
    with torch.no_grad():
        rows = [linear.weight for linear in (mlp.w_gate, mlp.w_up) if linear is not None]
        experts.w_in.copy_(torch.cat(rows).view(experts.w_in.shape[1:]).expand_as(experts.w_in))
        experts.w_out.copy_(mlp.w_out.weight.expand_as(experts.w_out))
    layer = MoELayer(TopKRouter(8, 4, 3, renormalise=True), experts, shared=None)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x), mlp(x), rtol=1e-4, atol=1e-5)
    shared = GatedMLP(8, 6, activation)
    layer.shared = shared
    dense = torch.sigmoid(x @ shared.gate.weight.T) * MLP.forward(shared, x)
    torch.testing.assert_close(layer(x), mlp(x) + dense, rtol=1e-4, atol=1e-5)


def test_a_cache_returns_everything_it_was_given():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 200, 2, 4).unbind(0)
    cache = LayerCache()
    for start, end in [(0, 3), (3, 4), (4, 90), (90, 200)]:
        k, v = cache.append(keys[:, start:end], values[:, start:end])
        assert torch.equal(k, keys[:, :end]) and torch.equal(v, values[:, :end])
    assert cache.length == 200


def test_a_block_adds_both_halves_to_the_residual_stream():
    torch.manual_seed(0)
    block = Block(16, Attention(16, 4, 2, 4), MLP(16, 24))
    x = torch.randn(2, 5, 16)
    rotation = RotaryTable(4, 10000.0, 8)(0, 5, CPU)
    middle = x + block.attention(block.attention_norm(x), rotation)
    torch.testing.assert_close(block(x, rotation, None, ALONE), middle + block.mlp(block.mlp_norm(middle)))
