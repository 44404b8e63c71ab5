"""Counts of use against a plain loop over tokens."""

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.moe.surgery.usage import measure_usage


def by_hand(stored_model, batches):
    """Hits and weights of each layer from the inputs of the routers of the whole model, token by token."""
    model, layers = stored_model.build().double(), stored_model.plan().moe_layers
    found = {layer: ([0] * 8, [0.0] * 8) for layer in layers}

    def look(layer):
        def hook(module, args):
            router = module.router
            for x in args[0].flatten(0, -2):
                scores = [float(row @ x) for row in router.weight]
                total = sum(torch.tensor(scores).double().exp().tolist())
                probs = [float(torch.tensor(score).double().exp()) / total for score in scores]
                ranked = sorted(range(8), key=lambda e: (-probs[e], e))
                if hasattr(router, "top_k"):
                    chosen = ranked[: router.top_k]
                else:
                    chosen = [e for rank, e in enumerate(ranked) if sum(probs[o] for o in ranked[:rank]) < 0.4]
                mass = sum(probs[e] for e in chosen) if router.renormalise else 1.0
                for e in chosen:
                    found[layer][0][e] += 1
                    found[layer][1][e] += probs[e] / mass

        return hook

    for layer, moe in model.moe_layers():
        moe.register_forward_pre_hook(look(layer))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return found


@pytest.mark.parametrize("router", [{}, {"top_k": 3, "renormalise": False}, {"threshold": 0.4}])
def test_hits_and_weights_equal_those_of_a_plain_loop(stored, tokens, router):
    source = stored(router, layers=3, first_k_dense=1, tie_embeddings=True)
    batches = [{"tokens": tokens, "labels": tokens.roll(-1, 1)}, {"tokens": tokens[:1] + 0, "labels": tokens[:1]}]
    usage, expected = measure_usage(source, batches), by_hand(source, batches)
    assert usage.layers == (1, 2) and usage.tokens == 80
    for row, layer in enumerate(usage.layers):
        assert usage.hits[row].tolist() == expected[layer][0]
        assert usage.weight[row].tolist() == pytest.approx(expected[layer][1], rel=1e-5)
    hits, weight = expected[2]
    frequency, share = [h / sum(hits) for h in hits], [w / sum(weight) for w in weight]
    product = [f * w for f, w in zip(frequency, share)]
    assert usage.scores("frequency")[2].tolist() == pytest.approx(frequency)
    assert usage.scores("weight")[2].tolist() == pytest.approx(share, rel=1e-5)
    assert usage.scores("weighted_frequency")[2].tolist() == pytest.approx(
        [p / sum(product) for p in product], rel=1e-5
    )
    expert = max(range(8), key=hits.__getitem__)
    assert usage.mean_weight(2, expert) == pytest.approx(weight[expert] / hits[expert], rel=1e-5)


def test_an_unknown_criterion_is_named(stored, tokens):
    usage = measure_usage(stored(), [{"tokens": tokens}])
    with pytest.raises(ConfigError, match="criterion=size is unknown, allowed: weighted_frequency, frequency, weight"):
        usage.scores("size")
