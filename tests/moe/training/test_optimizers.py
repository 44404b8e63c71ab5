import pytest
import torch
from torch import nn

from scatterfold.kernels import ConfigError
from scatterfold.moe.training.optimizers import AdamW, set_learning_rate


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.expert_bias = nn.Parameter(torch.zeros(3, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def names(model, parameters):
    lookup = {id(p): name for name, p in model.named_parameters()}
    return {lookup[id(p)] for p in parameters}


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_matrices_decay_and_norms_and_biases_do_not(decay_embeddings):
    model = Small()
    optimizer = AdamW(lr=1e-3, weight_decay=0.1, decay_embeddings=decay_embeddings)(model)
    by_decay = {group["weight_decay"]: names(model, group["params"]) for group in optimizer.param_groups}
    embeddings = {"embedding.weight"}
    assert by_decay[0.1] == {"linear.weight"} | (embeddings if decay_embeddings else set())
    spared = {"norm.weight", "norm.bias", "linear.bias", "expert_bias"}
    assert by_decay[0.0] == spared | (set() if decay_embeddings else embeddings)


def test_two_steps_equal_the_update_written_out():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    weight = model.weight.detach().clone()
    optimizer = AdamW(lr=1.0, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)(model)
    set_learning_rate(optimizer, 0.05)
    m = v = torch.zeros_like(weight)
    for t in (1, 2):
        grad = torch.randn_like(weight)
        model.weight.grad = grad.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad**2
        weight = weight * (1 - 0.05 * 0.2)
        weight = weight - 0.05 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "optimizer.lr=0.0 is out of range"),
        ({"betas": (0.9, 1.0)}, r"optimizer.betas=\[0.9, 1.0\] is out of range"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay=-1.0 is negative"),
        ({"eps": 0.0}, "optimizer.eps=0.0 is out of range"),
    ],
)
def test_impossible_values_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        AdamW(**{"lr": 1e-3, **change})


def test_the_fused_update_is_used_where_it_exists_and_can_be_refused():
    assert AdamW(lr=1e-3)(Small()).defaults["fused"] is True
    assert AdamW(lr=1e-3, fused=False)(Small()).defaults["fused"] is False
