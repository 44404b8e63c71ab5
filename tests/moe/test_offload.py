"""Activation offload, with a device that only pretends to be another one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scatterfold import Experts, ModelConfig, TopKRouter, Transformer
from scatterfold.moe import offload


@pytest.fixture
def moved(monkeypatch):
    """Sizes of the tensors that were moved. Copies are overwritten where they come from, to see that they are read."""
    sizes = []

    def to_host(saved):
        sizes.append(tuple(saved.shape))
        return saved.clone()

    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    monkeypatch.setattr(offload, "_leaves", lambda device: True)
    monkeypatch.setattr(offload, "_to_host", to_host)
    return sizes


def model_of(checkpointing="none", activation_offload=True):
    config = ModelConfig(
        vocab_size=19,
        layers=2,
        width=16,
        heads=2,
        first_k_dense=1,
        ffn_width=12,
        num_experts=4,
        expert_width=8,
        max_positions=8,
    )
    return Transformer(
        config,
        router=lambda: TopKRouter(16, 4, 2),
        experts=lambda: Experts(4, 16, 8),
        checkpointing=checkpointing,
        activation_offload=activation_offload,
    )


def learn(model):
    tokens = torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(0))
    model(tokens, tokens.roll(-1, 1)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_gradients_are_the_same_and_weights_stay(moved, checkpointing, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = learn(model_of(checkpointing))
        count = len(moved)
        expected = learn(model_of(checkpointing, activation_offload=False))
    assert 0 < count == len(moved)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    weights = {tuple(parameter.shape) for parameter in model_of().parameters() if parameter.ndim > 1}
    weights |= {shape[::-1] for shape in weights} | {(4, 16, 16)}  # experts: gate and up as one
    assert not weights & set(moved)
    if checkpointing == "full":
        assert moved == 2 * [(2, 7, 16)]  # the inputs of the two blocks


def test_a_tensor_saved_by_several_operations_moves_once(moved):
    x = torch.randn(3, 5, requires_grad=True) * 1.0
    with offload.offloaded():
        loss = (x.sin() + x.cos() + x.exp().detach() * x.tanh()).sum()
    assert moved.count((3, 5)) == 3  # x, x.exp() and x.tanh()
    loss.backward()


def test_memory_that_is_freed_and_used_again_is_another_tensor(moved):
    weight = nn.Parameter(torch.randn(4, 4))
    with offload.offloaded():
        outputs = [F.linear(torch.full((2, 4), float(value)), weight).sum() for value in range(6)]
    sum(outputs).backward()
    torch.testing.assert_close(weight.grad, torch.full((4, 4), 2.0 * sum(range(6))))


def test_a_changed_tensor_is_moved_again(moved):
    weight = nn.Parameter(torch.ones(3))
    buffer = torch.ones(3)
    with offload.offloaded():
        first = (weight * buffer).sum()
        buffer.mul_(5)
        second = (weight * buffer).sum()
    (first + second).backward()  # plain autograd would refuse: the first product saved what was changed
    assert weight.grad.tolist() == [6.0, 6.0, 6.0]


def test_nothing_moves_on_a_cpu(monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    monkeypatch.setattr(offload, "_to_host", lambda saved: pytest.fail("moved"))
    learn(model_of())
