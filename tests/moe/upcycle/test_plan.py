"""The plan's figures against the built model, and the receipt's against a plain comparison."""

from dataclasses import replace

import pytest
import torch

from scatterfold.moe.data.tokenizer import ByteTokenizer
from scatterfold.moe.upcycle import UpcycleSettings, measure, plan_upcycle, upcycle


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "fine_grained", "granularity": 4, "top_k": 4},
        {"method": "shared", "granularity": 4, "shared_shards": 2, "shared_gate": True},
        {"method": "adapter", "adapter_width": 8, "layers": (1,)},
        {"router": "threshold", "top_k": 4},
    ],
)
def test_sizes_are_those_of_the_built_model(make_dense, settings):
    dense, wanted = make_dense(), UpcycleSettings(**settings)
    made = upcycle([dense], wanted)
    plan = plan_upcycle([dense], wanted, made, "scatterfold", gpus=4)
    model = made.build()
    assert plan.before.parameters == sum(p.numel() for p in dense.build().parameters())
    assert plan.after.parameters == sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    idle = 0
    for _, layer in model.moe_layers():
        stacked = layer.experts.stacked
        used = wanted.top_k / wanted.experts
        idle += sum(p.numel() for p in stacked.parameters()) * (1 - used)
    assert plan.after.active == plan.after.parameters - idle
    assert plan.after.trained == trained
    assert plan.training_bytes == (16 * trained + 4 * (plan.after.parameters - trained)) / 4
    assert plan.output_bytes == 4 * plan.after.parameters
    assert plan.moe_layers == ((1,) if "layers" in settings else (0, 1)) and plan.layers == 2


def test_the_receipt_is_the_largest_difference_of_logits(make_dense):
    dense = make_dense()
    made = upcycle([dense], UpcycleSettings(method="noise", noise_std=0.1))
    measured = measure([dense], made, tokens=50)
    tokens = torch.randint(37, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = dense.build()(tokens), made.build()(tokens)
    (difference,) = measured.sources
    assert difference.largest == pytest.approx(float((after - before).abs().max()), rel=1e-4)
    assert difference.relative == pytest.approx(difference.largest / float(before.abs().max()), rel=1e-6)
    assert (measured.probe, measured.tokens, measured.loss) == ("random ids", 50, None)
    assert measured.experts_per_token == 2.0 and 1.0 < measured.busiest <= 4.0
    assert not measured.exact and measure([dense], upcycle([dense], UpcycleSettings()), tokens=50).exact


def test_a_threshold_router_says_how_many_experts_a_token_takes(make_dense):
    dense = make_dense(layers=1)
    made = upcycle([dense], UpcycleSettings(router="threshold", threshold=0.5, top_k=8))
    measured = measure([dense], made, tokens=200)
    assert measured.experts_per_token == pytest.approx(4.0, abs=0.3)  # even probabilities: half of the eight
    assert measured.exact


def test_text_is_the_probe_where_there_is_a_tokenizer(make_dense):
    dense = replace(make_dense(vocab_size=257), tokenizer=ByteTokenizer())
    measured = measure([dense], upcycle([dense], UpcycleSettings()), tokens=100)
    assert measured.probe == "text" and measured.tokens == 100
    assert measured.loss == pytest.approx(measured.sources[0].loss, rel=1e-5)
    assert 3 < measured.loss < 10  # an untrained model of 257 tokens: about ln 257 = 5.5
