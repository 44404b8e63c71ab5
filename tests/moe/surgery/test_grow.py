"""Growing: exact wherever the docstring says so, and noise that cancels."""

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.moe.surgery.grow import Noise, copies_of, grow
from scatterfold.moe.surgery.mixture import Mixture
from scatterfold.moe.surgery.operations import Grow
from scatterfold.moe.surgery.usage import Usage

CPU = torch.device("cpu")
EXACT = {
    "renormalised": {},
    "raw": {"renormalise": False, "top_k": 3},
    "raw, one": {"renormalise": False, "top_k": 1},
    "raw, biased": {"renormalise": False, "bias_rate": 0.01},
    "after": {"score": "softmax_after"},
    "sigmoid": {"score": "sigmoid", "scale": 2.5, "bias_rate": 0.01},
    "raw sigmoid": {"score": "sigmoid", "renormalise": False, "scale": 2.5},
    "groups": {"num_groups": 4, "top_groups": 2, "gate_bias": True},
    "threshold": {"threshold": 0.7, "max_experts": 4},
    "threshold, renormalised": {"threshold": 0.7, "renormalise": True},
}


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_all_experts_copied_and_chosen_as_often_compute_what_they_did(stored, logits, values, name, times):
    source = stored({"balance_global_batch": 0.1, **EXACT[name]}, shared_expert_width=6)
    made = Grow(8 * times, Noise(down=0.3)).make(Mixture.of(source), None, None, CPU)
    assert made.layers == dict.fromkeys((0, 1), [[e] for e in range(8) for _ in range(times)])
    torch.testing.assert_close(logits(made.stored), logits(source), rtol=1e-4, atol=2e-5)
    result = values(made.stored.checked())
    w_out = result["blocks.0.mlp.experts.w_out"]
    assert (w_out[0] - w_out[1]).abs().mean() > 0.01  # copies are apart all the same
    assert float(result["blocks.0.mlp.router.losses.balance_global_batch.load"].sum()) == pytest.approx(1.0)


def test_evaluation_chooses_as_many_copies(stored, logits):
    source = stored({"top_k": 3, "eval_top_k": 1, "renormalise": True})
    made = Grow(16).make(Mixture.of(source), None, None, CPU)
    assert made.notes == ("router.top_k is 6, it was 3", "router.eval_top_k is 2, it was 1")
    torch.testing.assert_close(logits(made.stored), logits(source), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("experts", [{}, {"_target_": "scatterfold.moe.AdapterExperts", "adapter_width": 5}])
def test_noise_of_copies_adds_up_to_zero_and_has_the_size_asked_for(stored, values, logits, experts):
    source = stored(None, experts, width=64, heads=4)
    made = grow(Mixture.of(source), dict.fromkeys((0, 1), [e for e in range(8) for _ in range(4)]), Noise(0.1, seed=3))
    key = "blocks.1.mlp.experts.adapters.w_out" if experts else "blocks.1.mlp.experts.w_out"
    before, after = values(source)[key], values(made)[key].unflatten(0, (8, 4))
    torch.testing.assert_close(after.mean(1), before, rtol=1e-5, atol=1e-6)
    apart = after - before[:, None]
    assert float(apart.std()) == pytest.approx(0.1 * (3 / 4) ** 0.5 * float(before.std()), rel=0.1)
    again = grow(Mixture.of(source), dict.fromkeys((0, 1), [e for e in range(8) for _ in range(4)]), Noise(0.1, seed=3))
    part = [slice(5, 9), *(slice(0, 2) for _ in range(2))]
    assert torch.equal(again.tensors[key].read(part), values(made)[key][5:9, :2, :2])  # a part is that of the whole
    torch.testing.assert_close(logits(made), logits(source), rtol=1e-4, atol=5e-5)


def test_without_noise_and_with_noise_of_the_router(stored, values):
    source = stored()
    copies = dict.fromkeys((0, 1), [0, 0, 1, 2, 3, 4, 5, 6, 7])
    plain, moved = (values(grow(Mixture.of(source), copies, Noise(0.0, router))) for router in (0.0, 0.5))
    for key, value in plain.items():
        if ".router." in key or ".experts." in key:
            assert torch.equal(value, values(source)[key][copies[0]]), key
    rows = "blocks.0.mlp.router.weight"
    assert torch.equal(moved[rows][2:], plain[rows][2:])
    assert (moved[rows][0] - plain[rows][0]).abs().mean() > 0.1 and not torch.equal(moved[rows][0], moved[rows][1])


def test_the_most_used_are_copied_once_more(stored, logits):
    hits = torch.tensor([[1.0, 9, 1, 1, 8, 1, 1, 1], [7.0, 1, 1, 1, 1, 1, 1, 6]]).double()
    source = stored()
    made = Grow(18).make(Mixture.of(source), Usage((0, 1), hits, hits, 20), None, CPU)
    counts = {
        layer: [[e] for e in range(8) for _ in range(2 + (e in twice))]
        for layer, twice in {0: (1, 4), 1: (0, 7)}.items()
    }
    assert made.layers == counts and made.stored.config["router"]["top_k"] == 2
    assert (logits(made.stored) - logits(source)).abs().max() > 1e-3  # copies take the places of others


def test_top_k_may_stay(stored):
    made = Grow(16, top_k=2).make(Mixture.of(stored()), None, None, CPU)
    assert made.stored.plan().make_router().top_k == 2 and made.notes == ()


@pytest.mark.parametrize(
    ("router", "operation", "message"),
    [
        ({}, Grow(8), "experts=8 is out of range, allowed: 9 or more, for instance 16"),
        ({}, Grow(12), "experts=12 copies some experts more often than others, by their use, allowed: data=CORPUS"),
        ({"num_groups": 2, "top_groups": 1}, Grow(13), "experts=13 does not divide over router.num_groups=2"),
    ],
)
def test_a_mistake_is_named_in_one_line(stored, router, operation, message):
    with pytest.raises(ConfigError, match=message) as error:
        operation.check(Mixture.of(stored(router)), "num_groups" in router)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("noise", [{"down": -1.0}, {"router": float("nan")}])
def test_noise_is_not_negative(noise):
    with pytest.raises(ConfigError, match="noise=.* is out of range, allowed: 0 or more"):
        Noise(**noise)


def test_groups_are_copied_within_themselves(stored):
    source = stored({"num_groups": 2, "top_groups": 1})
    used = dict.fromkeys((0, 1), torch.tensor([9.0, 8, 7, 6, 1, 0, 0, 2]))
    copies = copies_of(Mixture.of(source), 10, used)
    assert copies[0] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 7]
