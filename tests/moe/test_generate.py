import pytest
import torch

from scatterfold import ConfigError, Experts, ModelConfig, TopKRouter, Transformer
from scatterfold.moe import generate
from scatterfold.moe.blocks import KeyValueCache, LatentAttention
from scatterfold.moe.generate import _choose


def make(**settings):
    config = ModelConfig(
        **{
            "vocab_size": 31,
            "layers": 2,
            "width": 16,
            "heads": 4,
            "kv_heads": 2,
            "max_positions": 40,
            "num_experts": 4,
            "expert_width": 12,
            **settings,
        }
    )
    return Transformer(config, lambda: TopKRouter(16, 4, 2), lambda: Experts(4, 16, 12)).eval()


def recomputed(model, tokens, count, window=None):
    """Greedy continuation that reads the whole text anew for every token."""
    tokens = list(tokens)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens[-(window or len(tokens)) :]]))[0, -1].argmax()))
    return tokens[-count:]


SETTINGS = [
    {},
    {"sliding_window": 5},
    {"qk_norm": "head", "head_width": 6},
    {"attention_sinks": True, "sliding_window": 5, "window_layers": (1,), "attention_output_bias": True},
    {"rotary_width": 2},
    {"kv_heads": None, "latent_attention": LatentAttention(12, 6, 4, 8, q_rank=10)},
    {"kv_heads": None, "latent_attention": LatentAttention(12, 6, 4, 8, interleaved=False), "sliding_window": 5},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_cache_changes_nothing(settings):
    model = make(**settings)
    assert list(generate(model, [3, 1, 4], 20)) == recomputed(model, [3, 1, 4], 20)


@pytest.mark.parametrize("settings", SETTINGS)
def test_cached_logits_equal_those_of_one_pass(settings):
    model = make(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "bias")):
                parameter.normal_()
    tokens = torch.randint(0, 31, (2, 12))
    whole = model(tokens)
    cache = KeyValueCache(2)
    pieces = [model(piece, cache=cache) for piece in tokens.split([4, 1, 3, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.length == 12


def test_a_long_text_slides_the_window():
    model = make(max_positions=8)
    prompt = [5, 9, 2, 7, 1, 8, 3, 3, 6, 4]
    made = list(generate(model, prompt, 12))
    text = prompt[-8:]
    expected = recomputed(model, text, 1)  # the window is full with the newest 8 of the prompt
    text = prompt + expected
    expected += recomputed(model, text[-4:], 5)  # then its newest half is read again and grows to 8
    text = prompt + expected
    expected += recomputed(model, text[-4:], 5)
    text = prompt + expected
    expected += recomputed(model, text[-4:], 1)
    assert made == expected


def test_sampling_is_a_function_of_the_seed():
    model = make()
    first = list(generate(model, [1], 15, temperature=1.5, seed=1))
    assert first == list(generate(model, [1], 15, temperature=1.5, seed=1))
    assert first != list(generate(model, [1], 15, temperature=1.5, seed=2))
    assert list(generate(model, [1], 15)) == list(generate(model, [1], 15, seed=2))


def test_samples_follow_the_tempered_distribution_within_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    random = torch.Generator().manual_seed(0)
    for temperature, top_p, kept in [(1.0, 1.0, 4), (2.0, 1.0, 4), (1.0, 0.8, 2), (1.0, 0.5, 1)]:
        probs = (logits / temperature).softmax(-1)
        probs = torch.where(torch.arange(4) < kept, probs, 0.0)
        probs = probs / probs.sum()
        draws = torch.tensor([_choose(logits, temperature, top_p, random) for _ in range(3000)])
        torch.testing.assert_close(draws.bincount(minlength=4) / 3000, probs, rtol=0, atol=0.03)


def test_it_stops_and_leaves_the_model_as_it_was():
    model = make().train()
    made = list(generate(model, [3], 10))
    assert model.training
    stop = made[4]
    assert list(generate(model, [3], 10, stop=stop)) == made[: made.index(stop)]
    assert list(generate(model, [3], 0)) == []
    steps = generate(model, [3], 10)
    next(steps)
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_tokens": []}, "prompt is empty"),
        ({"prompt_tokens": [1, 31]}, "prompt token 31 is unknown, allowed: 0 to 30"),
        ({"max_tokens": -1}, "max_tokens=-1 is negative"),
        ({"temperature": -0.5}, "temperature=-0.5 is out of range"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"top_p": 0.0}, "top_p=0.0 is out of range"),
    ],
)
def test_bad_values_are_refused_before_the_first_token(arguments, message):
    with pytest.raises(ConfigError, match=message):
        generate(make(), **{"prompt_tokens": [1], "max_tokens": 5, **arguments})
