"""Auxiliary losses against loops in float64 and against their closed forms."""

import math

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.moe.routers.losses import Decision, GlobalBatchBalance, MicroBatchBalance, SequenceBalance, ZLoss

E, K, S, B = 6, 2, 5, 3


def decision(seed=0, num_sequences=B):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_sequences * S, E, generator=generator, dtype=torch.float64).requires_grad_()
    probs = logits.softmax(-1)
    counts = torch.zeros(num_sequences, E, dtype=torch.int64)
    for token, chosen in enumerate(probs.argsort(dim=-1, descending=True)[:, :K].tolist()):
        for expert in chosen:
            counts[token // S, expert] += 1
    return Decision(logits, probs, counts)


def loop_balance(probs, counts, alpha):
    """alpha * E * sum f P over one group of tokens."""
    total = sum(counts)
    means = [sum(row[e] for row in probs) / len(probs) for e in range(len(counts))]
    return alpha * len(counts) * sum(c / total * p for c, p in zip(counts, means))


def test_micro_batch_equals_the_loop():
    d = decision()
    expected = loop_balance(d.probs.tolist(), d.counts.sum(0).tolist(), 0.3)
    assert MicroBatchBalance("f", 0.3)(d).item() == pytest.approx(expected, rel=1e-6)


def test_sequence_equals_the_loop():
    d = decision()
    expected = [loop_balance(d.probs[b * S : (b + 1) * S].tolist(), d.counts[b].tolist(), 0.3) for b in range(B)]
    assert SequenceBalance("f", 0.3)(d).item() == pytest.approx(sum(expected) / B, rel=1e-6)


def test_global_batch_uses_the_counts_of_the_step_before():
    d, loss = decision(), GlobalBatchBalance("f", 0.3, E)
    assert loss(d).item() == pytest.approx(0.3, rel=1e-6)  # uniform at first ...
    assert torch.autograd.grad(loss(d), d.logits)[0].abs().max() < 1e-8  # ... hence no gradient
    counts = torch.tensor([5, 0, 3, 2, 9, 1])
    loss.finish_step(counts)
    assert loss(d).item() == pytest.approx(loop_balance(d.probs.tolist(), counts.tolist(), 0.3), rel=1e-6)
    loss.reset_buffers()
    assert loss(d).item() == pytest.approx(0.3, rel=1e-6)


def test_z_loss_equals_the_loop():
    d = decision()
    squares = [math.log(sum(math.exp(z) for z in row)) ** 2 for row in d.logits.tolist()]
    assert ZLoss("f", 0.01)(d).item() == pytest.approx(0.01 * sum(squares) / len(squares), rel=1e-6)


def test_closed_forms_balanced_and_collapsed():
    balanced = Decision(torch.zeros(E, E), torch.full((E, E), 1 / E), torch.full((1, E), K))
    on_two = torch.zeros(1, E, dtype=torch.int64)
    on_two[0, :K] = E
    probs = torch.zeros(E, E)
    probs[:, :K] = 1 / K
    collapsed = Decision(torch.zeros(E, E), probs, on_two)
    for loss in (MicroBatchBalance("f", 0.01), SequenceBalance("f", 0.01)):
        assert loss(balanced).item() == pytest.approx(0.01, rel=1e-5)
        assert loss(collapsed).item() == pytest.approx(0.01 * E / K, rel=1e-5)


def test_gradient_has_the_form_of_the_paper():
    """dL/dz_te = (alpha E / T) p_te (f_e - sum_j f_j p_tj)."""
    d = decision()
    (grad,) = torch.autograd.grad(MicroBatchBalance("f", 0.3)(d), d.logits)
    share = d.counts.sum(0).double() / d.counts.sum()
    probs = d.probs.detach()
    expected = 0.3 * E / len(probs) * probs * (share - (probs * share).sum(-1, keepdim=True))
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)
    d = decision()
    (grad,) = torch.autograd.grad(ZLoss("f", 0.01)(d), d.logits)
    lse = d.logits.detach().logsumexp(-1, keepdim=True)
    torch.testing.assert_close(grad, 2 * 0.01 / len(probs) * lse * d.probs.detach())


@pytest.mark.parametrize("make", [SequenceBalance, lambda f, a: GlobalBatchBalance(f, a, E), ZLoss])
def test_token_weighted_mean_of_parts_is_the_whole(make):
    d, loss = decision(), make("f", 0.3)
    loss.finish_step(torch.tensor([5, 0, 3, 2, 9, 1]))
    parts = [
        Decision(d.logits[b * S : (b + 1) * S], d.probs[b * S : (b + 1) * S], d.counts[b : b + 1]) for b in range(B)
    ]
    mean = sum(loss(part) for part in parts) / B
    torch.testing.assert_close(mean, loss(d))
    (of_parts,) = torch.autograd.grad(mean, d.logits, retain_graph=True)
    (of_whole,) = torch.autograd.grad(loss(d), d.logits)
    torch.testing.assert_close(of_parts, of_whole)


def test_no_tokens_give_zero():
    empty = Decision(torch.zeros(0, E), torch.zeros(0, E), torch.zeros(1, E, dtype=torch.int64))
    for loss in (
        MicroBatchBalance("f", 1.0),
        SequenceBalance("f", 1.0),
        GlobalBatchBalance("f", 1.0, E),
        ZLoss("f", 1.0),
    ):
        assert loss(empty).item() == 0.0


def test_negative_coefficient():
    with pytest.raises(ConfigError, match=r"^router.z_loss=-1.0 is out of range, allowed: 0 or more$"):
        ZLoss("z_loss", -1.0)
