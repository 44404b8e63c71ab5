"""What the model promises to the rest: packed documents, checkpointing, deterministic initial values."""

import time

import pytest
import torch
from torch import nn

from scatterfold import ConfigError, Experts, ModelConfig, ThresholdRouter, TopKRouter, Transformer
from scatterfold.moe.context import StepContext

SHAPE = {"vocab_size": 41, "layers": 3, "width": 16, "heads": 4, "kv_heads": 2, "max_positions": 64}
MOE = {"num_experts": 4, "expert_width": 12}


def make(checkpointing="none", seed=0, router=None, **settings):
    config = ModelConfig(**{**SHAPE, **MOE, **settings})
    return Transformer(
        config,
        router=router or (lambda: TopKRouter(config.width, config.num_experts, 2)),
        experts=lambda: Experts(config.num_experts, config.width, config.expert_width),
        checkpointing=checkpointing,
        seed=seed,
    )


def batch(rows=2, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 41, (rows, length + 1), generator=generator)


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 3}, {"qk_norm": "head", "num_experts": 0, "ffn_width": 8}])
def test_packed_documents_equal_separate_passes(settings):
    model = make(**settings).eval()
    tokens = batch()[:, :-1]
    boundaries = [0, 5, 12, 15, 16, 24]
    packed = model(tokens, cu_seqlens=torch.tensor(boundaries, dtype=torch.int32)).flatten(0, 1)
    for start, end in zip(boundaries, boundaries[1:]):
        alone = model(tokens.flatten()[None, start:end])[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed, model(tokens).flatten(0, 1), atol=1e-3)


def test_the_loss_is_the_sum_over_labels():
    model = make(tie_embeddings=True)
    tokens, labels = batch()[:, :-1], batch()[:, 1:].clone()
    labels[0, 3:] = -100
    reference = nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, labels), reference)


class Statistics:
    """Counts what MoE layers report."""

    def __init__(self):
        self.calls, self.counts = [], 0

    def record(self, index, routed, num_tokens):
        self.calls.append(index)
        self.counts = self.counts + routed.counts


@pytest.mark.parametrize("router", ["top_k", "threshold"])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointing_changes_neither_loss_nor_gradients_nor_counts(mode, router):
    routers = {
        "top_k": lambda: TopKRouter(16, 4, 2, balance_micro_batch=0.1, jitter=0.1, capacity_factor=1.0),
        "threshold": lambda: ThresholdRouter(16, 4, 0.6, z_loss=0.1),
    }
    results = []
    for checkpointing in ("none", mode):
        model = make(checkpointing, router=routers[router], first_k_dense=1, ffn_width=20)
        statistics = Statistics()
        tokens = batch()
        torch.manual_seed(5)
        cu_seqlens = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
        context = StepContext(global_tokens=24, statistics=statistics)
        loss = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=cu_seqlens, context=context)
        loss.backward()
        results.append((loss, dict(model.named_parameters()), statistics))
    (loss, plain, counted), (same_loss, recomputed, same_counted) = results
    assert torch.equal(loss, same_loss)
    for name, parameter in plain.items():
        torch.testing.assert_close(recomputed[name].grad, parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert counted.calls == same_counted.calls == [1, 2]
    assert torch.equal(counted.counts, same_counted.counts)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_blocks_give_the_same(mode):
    """Auxiliary losses included: they must not get lost in the trace."""
    results = []
    for compiled in (False, True):
        model = make(mode, router=lambda: TopKRouter(16, 4, 2, z_loss=1.0), layers=2, first_k_dense=1, ffn_width=20)
        if compiled:
            for block in model.sharding_units():
                block.compile(backend="aot_eager")
        statistics, tokens = Statistics(), batch()
        for cu_seqlens in (None, torch.tensor([0, 5, 12, 24], dtype=torch.int32)):
            context = StepContext(global_tokens=48, statistics=statistics)
            model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=cu_seqlens, context=context).backward()
        results.append((dict(model.named_parameters()), statistics))
    (plain, counted), (traced, same_counted) = results
    for name, parameter in plain.items():
        torch.testing.assert_close(traced[name].grad, parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert counted.calls == same_counted.calls
    assert torch.equal(counted.counts, same_counted.counts)


def saved_bytes(model, rows=4, length=32):
    saved = {}
    tokens = batch(rows, length)

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.hidden(tokens[:, :-1]).sum()
    del loss
    return sum(saved.values())


def test_checkpointing_keeps_less():
    settings = {"width": 32, "expert_width": 64, "layers": 4}
    none, selective, full = (saved_bytes(make(mode, **settings)) for mode in ("none", "selective", "full"))
    assert full < selective < none


def test_a_model_from_the_meta_device_has_the_same_bits():
    settings = {"shared_expert_width": 8, "shared_expert_gate": True, "attention_bias": True, "qk_norm": "head"}
    router = lambda: TopKRouter(16, 4, 2, bias_rate=0.1, balance_global_batch=0.1, gate_bias=True)  # noqa: E731
    real = make(seed=3, router=router, **settings)
    torch.manual_seed(9)  # the global generator must not matter
    with torch.device("meta"):
        virtual = make(seed=3, router=router, **settings)
    assert all(parameter.is_meta for parameter in virtual.parameters())
    virtual.to_empty(device="cpu")
    for tensor in virtual.state_dict().values():
        tensor.fill_(float("nan"))
    virtual.reset_parameters(3)
    expected = real.state_dict()
    assert expected.keys() == virtual.state_dict().keys()
    for name, value in virtual.state_dict().items():
        assert torch.equal(value, expected[name]), name
    tokens = batch()[:, :-1]
    assert torch.equal(real(tokens), virtual(tokens))
    other = make(seed=4, router=router, **settings).state_dict()
    assert not torch.equal(other["embedding.weight"], expected["embedding.weight"])


def test_a_model_of_47_billion_parameters_is_built_without_memory():
    config = ModelConfig(32000, 32, 4096, 32, 8, num_experts=8, expert_width=14336)
    start = time.perf_counter()
    with torch.device("meta"):
        model = Transformer(config, lambda: TopKRouter(4096, 8, 2), lambda: Experts(8, 4096, 14336))
    assert time.perf_counter() - start < 10
    assert sum(parameter.numel() for parameter in model.parameters()) == 46_702_792_704


def test_initial_deviations_follow_fan_in_depth_and_experts():
    settings = {"vocab_size": 500, "width": 128, "heads": 4, "expert_width": 192, "layers": 8, "num_experts": 6}
    moe = make(**settings, router=lambda: TopKRouter(128, 6, 2))
    dense = make(**{**settings, "num_experts": 0, "ffn_width": 192})
    depth = (2 * 8) ** -0.5
    expected = {
        "embedding.weight": 128**-0.5,
        "head.weight": 128**-0.5,
        "blocks.0.attention.wq.weight": 128**-0.5,
        "blocks.0.attention.wo.weight": 128**-0.5 * depth,
        "blocks.5.mlp.router.weight": 0.02,
        "blocks.5.mlp.experts.w_in": 128**-0.5,
        "blocks.5.mlp.experts.w_out": 192**-0.5 * depth,
    }
    for name, std in expected.items():
        assert moe.get_parameter(name).std().item() == pytest.approx(std, rel=0.05), name
    for name in ("w_in", "w_out"):
        for expert in moe.get_parameter(f"blocks.5.mlp.experts.{name}"):
            dense_name = {"w_in": "w_up", "w_out": "w_out"}[name]
            dense_std = dense.get_parameter(f"blocks.5.mlp.{dense_name}.weight").std().item()
            assert expert.std().item() == pytest.approx(dense_std, rel=0.05)
    assert torch.equal(moe.get_parameter("norm.weight"), torch.ones(128))
    narrow = make(**settings, init_std=0.01, router=lambda: TopKRouter(128, 6, 2))
    assert narrow.get_parameter("blocks.0.attention.wq.weight").std().item() == pytest.approx(0.01, rel=0.05)


def test_an_expert_does_not_depend_on_how_many_there_are():
    few, many = make(), make(num_experts=7)
    name = "blocks.1.mlp.experts.w_in"
    assert torch.equal(few.get_parameter(name), many.get_parameter(name)[:4])


@pytest.mark.parametrize("layers", [2, 16])
def test_the_residual_stream_has_the_same_size_at_any_depth(layers):
    model = make(layers=layers, width=64, expert_width=64, router=lambda: TopKRouter(64, 4, 2))
    sizes = []
    last = model.sharding_units()[-1]
    last.register_forward_hook(lambda module, args, out: sizes.append(out.square().mean().sqrt().item()))
    model(batch(4, 32)[:, :-1])
    assert 0.45 < sizes[0] < 0.75


def test_which_layers_have_experts():
    model = make(layers=5, moe_layers=(1, 4), ffn_width=8)
    assert [layer for layer, _ in model.moe_layers()] == [1, 4]
    assert [moe.index for _, moe in model.moe_layers()] == [1, 4]
    assert make(layers=6, first_k_dense=2, moe_every=2, ffn_width=8).moe_layers()[0][0] == 3
    assert make(num_experts=1, ffn_width=8).moe_layers() == []
    assert model.sharding_units() == list(model.blocks.values())


def test_bfloat16_autocast_stays_close():
    model = make(qk_norm="head")
    tokens = batch()
    exact = model(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens[:, :-1], tokens[:, 1:])
    half.backward()
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"65 tokens is longer than model.max_positions=64"):
        make()(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ConfigError, match="activation_checkpointing='some' is unknown, allowed: none, full, selective"):
        make("some")
    with pytest.raises(ConfigError, match="no router or experts"):
        Transformer(ModelConfig(**SHAPE, **MOE))
