"""Parts of a model, one after the other, are the model."""

import pytest
import torch

from scatterfold import Experts, ModelConfig, TopKRouter, Transformer
from scatterfold.kernels import ConfigError

SHAPE = {"vocab_size": 40, "layers": 5, "width": 16, "heads": 4, "kv_heads": 2, "max_positions": 32, "ffn_width": 24}
MOE = {"num_experts": 6, "expert_width": 20, "first_k_dense": 1}


def make(layers=None, **options):
    config = ModelConfig(**{**SHAPE, **MOE, **options})
    return Transformer(config, lambda: TopKRouter(16, 6, 2), lambda: Experts(6, 16, 20), seed=4, layers=layers)


def test_names_and_values_are_those_of_the_whole():
    whole, parts = make().state_dict(), [make(range(2)), make(range(2, 4)), make([4])]
    found = [part.state_dict() for part in parts]
    assert list(whole) == [name for state in found for name in state]
    for state in found:
        torch.testing.assert_close(state, {name: whole[name] for name in state}, rtol=0, atol=0)


def test_one_after_the_other_they_compute_the_whole():
    tokens = torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(0))
    cuts = torch.tensor([0, 7, 16, 32, 40, 48], dtype=torch.int32)
    parts, hidden = [make(range(2)), make(range(2, 4)), make([4])], None
    for part in parts:
        received = hidden
        hidden = part(tokens, tokens, cuts, received=received)
        if not part.is_last:
            assert tuple(hidden.shape) == part.hidden_shape(tokens)
    assert hidden == make()(tokens, tokens, cuts)
    logits = parts[-1](tokens, cu_seqlens=cuts, received=received)
    torch.testing.assert_close(logits, make()(tokens, cu_seqlens=cuts), rtol=0, atol=0)


def test_parts_tell_their_own_layers():
    part = make(range(2, 4))
    assert [layer for layer, _ in part.moe_layers()] == [2, 3]
    assert part.sharding_units() == [part.blocks["2"], part.blocks["3"]]
    assert (part.embedding, part.norm, part.head) == (None, None, None)
    assert [layer for layer, _ in make(range(2)).moe_layers()] == [1]


def test_tied_embeddings_need_one_part():
    make(tie_embeddings=True)
    with pytest.raises(ConfigError, match="model.tie_embeddings=true with layout.pp above 1, allowed: false"):
        make(range(2), tie_embeddings=True)
