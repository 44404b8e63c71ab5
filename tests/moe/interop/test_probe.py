"""A model run layer by layer against the whole module."""

from pathlib import Path

import pytest
import torch

from scatterfold.kernels import CheckpointError, ConfigError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.interop.probe import largest_difference, layers_of, probe_tokens, run_layers
from scatterfold.moe.interop.stored import StoredModel
from scatterfold.parallel.checkpoint import model_state
from scatterfold.parallel.checkpoint.lazy import LazyTensor, in_memory

VARIANTS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "dense layers, shared expert": {"first_k_dense": 1, "shared_expert_width": 6},
    "window, head norms": {"sliding_window": 5, "qk_norm": "head"},
    "dense": {"num_experts": 0},
    "frozen": {"frozen": ["embedding.*"]},
}


def stored(seed=1, **model):
    config = {
        "model": {
            **{"vocab_size": 31, "layers": 3, "width": 16, "heads": 4, "ffn_width": 24, "expert_width": 12},
            **{"num_experts": 4, "max_positions": 40, **model},
        },
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2, "eval_top_k": 1, "bias_rate": 0.1},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
    }
    built = ModelPlan.from_config(config).make_model()
    built.reset_parameters(seed)
    tensors = {name.removeprefix("model."): in_memory(tensor) for name, tensor in model_state(built).items()}
    return StoredModel(Path("source"), "scatterfold", config, tensors)


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_together_are_the_model(name):
    source = stored(**VARIANTS[name])
    tokens = [probe_tokens(source, rows, 20, seed=rows) for rows in (1, 3)]
    boundaries = torch.tensor([0, 7, 20], dtype=torch.int32)
    batches = [{"tokens": tokens[0], "cu_seqlens": boundaries}, {"tokens": tokens[1], "labels": tokens[1].roll(-1, 1)}]
    model = source.build()
    with torch.no_grad():
        expected = [model(**batch) for batch in batches]
    for one, other in zip(run_layers(source, batches), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_part_holds_one_layer_and_is_made_when_it_is_asked_for():
    source, read = stored(), []

    def noting(name, tensor):
        return LazyTensor(tensor.shape, tensor.dtype, lambda index: read.append(name) or tensor.read(index))

    tensors = {name: noting(name, tensor) for name, tensor in source.tensors.items()}
    parts = layers_of(source.with_model(source.config, tensors))
    for layer in range(3):
        read.clear()
        part = next(parts)
        assert list(part.blocks) == [str(layer)] and not part.training
        outside = {"embedding.weight"} if layer == 0 else {"norm.weight", "head.weight"} if layer == 2 else set()
        assert {name for name in read if not name.startswith(f"blocks.{layer}.")} == outside


def test_the_largest_difference_of_logits():
    one, other = stored(), stored()
    tokens = probe_tokens(one)
    assert tokens.shape == (2, 40)  # no longer than the model reads
    assert largest_difference(one, other, tokens) == 0.0
    changed = {**other.tensors, "norm.weight": in_memory(torch.full((16,), 1.25))}
    other = other.with_model(other.config, changed)
    with torch.no_grad():
        expected = (one.build()(tokens) - other.build()(tokens)).abs().max()
    assert largest_difference(one, other, tokens) == pytest.approx(float(expected), rel=1e-5)


def test_other_vocabularies_and_missing_tensors_are_named():
    one = stored()
    with pytest.raises(ConfigError, match="model.vocab_size=30 differs from 31 of source, allowed: the same"):
        largest_difference(one, stored(vocab_size=30), probe_tokens(one))
    lacking = {name: tensor for name, tensor in one.tensors.items() if name != "blocks.2.mlp.router.weight"}
    with pytest.raises(CheckpointError, match=r"source lacks blocks.2.mlp.router.weight"):
        run_layers(one.with_model(one.config, lacking), [{"tokens": probe_tokens(one)}])
