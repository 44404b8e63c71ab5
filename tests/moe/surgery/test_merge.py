"""Merging against means by hand, groups against a search over all partitions, and neurons against permutations."""

import itertools

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.moe.surgery.grow import Noise, copies_of, grow
from scatterfold.moe.surgery.matching import best_assignment
from scatterfold.moe.surgery.merge import groups_of, merge
from scatterfold.moe.surgery.mixture import Mixture
from scatterfold.moe.surgery.operations import Merge
from scatterfold.moe.surgery.similarity import (
    around_dominant,
    by_average_linkage,
    expert_weights,
    mean_outputs,
    router_rows,
)
from scatterfold.moe.surgery.usage import Usage

CPU = torch.device("cpu")
GROUPS = {0: [[2, 0], [1], [3, 6, 7], [5, 4]], 1: [[0, 1, 2], [4, 3], [5], [7, 6]]}
USED = {0: torch.tensor([1.0, 2, 3, 4, 0, 0, 6, 7]), 1: torch.tensor([0.0, 0, 0, 1, 1, 1, 3, 5])}


def test_a_merged_expert_is_the_mean_by_use_of_weights_rows_and_biases(stored, values):
    router = {"gate_bias": True, "bias_rate": 0.01, "balance_global_batch": 0.1}
    source = stored(router, {"bias": True}, shared_expert_width=6)
    result = merge(Mixture.of(source), GROUPS, USED)
    before, after = values(source), values(result)
    assert result.checked().plan().config.num_experts == 4 and before.keys() == after.keys()
    for key, value in after.items():
        words = key.split(".")
        if not (".router." in key or ".experts." in key):
            assert torch.equal(value, before[key]), key
            continue
        layer = int(words[1])
        for at, members in enumerate(GROUPS[layer]):
            use = [float(USED[layer][e]) for e in members]
            share = [1 / len(members)] * len(members) if sum(use) == 0 else [u / sum(use) for u in use]
            if key.endswith(".load"):
                share = [1.0] * len(members)
            expected = sum(before[key][e].double() * s for e, s in zip(members, share))
            torch.testing.assert_close(value[at].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by", ["router", "weights", "outputs"])
def test_copies_are_found_and_become_what_they_were(stored, values, logits, tokens, by):
    """Experts doubled, then merged again: the model from before."""
    source = stored()
    mixture = Mixture.of(source)
    doubled = grow(mixture, copies_of(mixture, 16, None), Noise(down=0.0))
    again = Mixture.of(doubled)
    similar = {
        "router": lambda: router_rows(again),
        "weights": lambda: expert_weights(again),
        "outputs": lambda: mean_outputs(again, [{"tokens": tokens}]),
    }[by]()
    used = dict.fromkeys((0, 1), torch.ones(16))
    groups = groups_of(again, similar, used, 8, "hierarchical")
    assert groups == dict.fromkeys((0, 1), [[2 * e, 2 * e + 1] for e in range(8)])
    result = merge(again, groups, used, top_k=2)
    for key, value in values(source).items():
        torch.testing.assert_close(values(result)[key], value)
    torch.testing.assert_close(logits(result), logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [{}, {"activation": "relu2", "bias": True}])
def test_alignment_undoes_a_permutation_of_neurons(stored, values, logits, experts):
    """Expert 1 is expert 0 with its neurons shuffled: aligned, their mean is expert 0."""
    source = stored(None, experts)
    tensors, order = values(source), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        for name, dim in (("w_in", -2), ("w_out", -1), ("b_in", -1)):
            key = f"blocks.{layer}.mlp.experts.{name}"
            if key in tensors:
                tensors[key][1] = tensors[key][0].index_select(dim, order)
        for key in (f"blocks.{layer}.mlp.experts.b_out", f"blocks.{layer}.mlp.router.weight"):
            if key in tensors:
                tensors[key][1] = tensors[key][0]
    shuffled = stored(None, experts, tensors)
    groups, used = [[0, 1], *([e] for e in range(2, 8))], dict.fromkeys((0, 1), torch.arange(1.0, 9.0))
    results = [
        values(merge(Mixture.of(shuffled), dict.fromkeys((0, 1), groups), used, align=align)) for align in (True, False)
    ]
    for layer in (0, 1):
        for name in ("w_in", "w_out", "b_in"):
            key = f"blocks.{layer}.mlp.experts.{name}"
            if key in tensors:
                torch.testing.assert_close(results[0][key][0], tensors[key][0], rtol=1e-6, atol=1e-6)
                assert (results[1][key][0] - tensors[key][0]).abs().max() > 0.05


def test_similarities_are_cosines(stored, values, tokens):
    source = stored(layers=1)
    tensors, model = values(source), source.build().double()
    flat = torch.cat([tensors[f"blocks.0.mlp.experts.{n}"].flatten(1).double() for n in ("w_in", "w_out")], 1)
    inputs = []
    model.blocks["0"].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
        outputs = torch.stack([by_hand(tensors, e, inputs[0]).mean(0) for e in range(8)])
    rows = {"router": tensors["blocks.0.mlp.router.weight"].double(), "weights": flat, "outputs": outputs}
    mixture = Mixture.of(source)
    found = {
        "router": router_rows(mixture),
        "weights": expert_weights(mixture),
        "outputs": mean_outputs(mixture, [{"tokens": tokens[:1]}, {"tokens": tokens[1:]}]),
    }
    for name, vectors in rows.items():
        for one, other in itertools.product(range(8), range(8)):
            cosine = vectors[one] @ vectors[other] / vectors[one].norm() / vectors[other].norm()
            assert float(found[name][0][one, other]) == pytest.approx(float(cosine), abs=1e-4), name


def by_hand(tensors, expert, x):
    w_in, w_out = (tensors[f"blocks.0.mlp.experts.{name}"][expert].double() for name in ("w_in", "w_out"))
    return (torch.nn.functional.silu(x @ w_in[0].T) * (x @ w_in[1].T)) @ w_out.T


def test_others_join_the_most_used_expert_that_they_are_most_alike():
    alike = torch.eye(5)
    alike[0, 2], alike[0, 4], alike[1, 2], alike[1, 4], alike[3, 2], alike[3, 4] = 0.1, 0.2, 0.9, 0.3, -0.5, -0.4
    used = torch.tensor([0.1, 0.2, 0.4, 0.1, 0.3])
    assert around_dominant(alike, used, range(5), 2) == [[2, 1], [4, 0, 3]]
    assert around_dominant(alike, torch.ones(5), [1, 3, 4], 3) == [[1], [3], [4]]


@pytest.mark.parametrize("seed", range(5))
def test_average_linkage_joins_the_pair_with_the_highest_mean(seed):
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    alike = rows @ rows.T
    groups = [[e] for e in range(7)]
    while len(groups) > 3:
        pairs = [
            (sum(float(alike[a, b]) for a in one for b in other) / len(one) / len(other), i, j)
            for (i, one), (j, other) in itertools.combinations(enumerate(groups), 2)
        ]
        _, i, j = max(pairs)
        groups[i] = groups[i] + groups.pop(j)
    found = by_average_linkage(alike.float(), torch.arange(7.0), range(7), 3)
    assert {frozenset(group) for group in found} == {frozenset(group) for group in groups}
    assert all(group == sorted(group, reverse=True) for group in found)  # the most used first


def test_groups_of_a_router_are_not_mixed(stored):
    source = stored({"num_groups": 2, "top_groups": 1})
    alike = torch.ones(8, 8)
    used = dict.fromkeys((0, 1), torch.arange(8.0))
    groups = groups_of(Mixture.of(source), dict.fromkeys((0, 1), alike), used, 4, "dominant")
    for members in groups[0]:
        assert len({expert // 4 for expert in members}) == 1
    with pytest.raises(ConfigError, match="experts=3 does not divide over router.num_groups=2"):
        Merge(experts=3).check(Mixture.of(source), False)


def test_adapters_are_merged_and_their_mlp_stays(stored, values):
    source = stored(None, {"_target_": "scatterfold.moe.AdapterExperts", "adapter_width": 5})
    before, after = values(source), values(merge(Mixture.of(source), GROUPS, USED, align=True))
    assert torch.equal(after["blocks.0.mlp.experts.ffn.w_up.weight"], before["blocks.0.mlp.experts.ffn.w_up.weight"])
    assert after["blocks.0.mlp.experts.adapters.w_in"].shape == (4, 5, 16)
    assert torch.equal(after["blocks.0.mlp.experts.adapters.w_in"][1], before["blocks.0.mlp.experts.adapters.w_in"][1])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_an_assignment_is_the_best_of_all_permutations(size):
    for seed in range(20):
        gain = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double().numpy()
        chosen = best_assignment(gain)
        assert sorted(chosen) == list(range(size))
        best = max(sum(gain[i, p[i]] for i in range(size)) for p in itertools.permutations(range(size)))
        assert sum(gain[i, column] for i, column in enumerate(chosen)) == pytest.approx(best)


def test_without_a_text_all_experts_count_alike(stored, values):
    source = stored()
    made = Merge(experts=7, by="weights").make(Mixture.of(source), None, None, CPU)
    (pair,) = (group for group in made.layers[0] if len(group) == 2)
    at = made.layers[0].index(pair)
    key = "blocks.0.mlp.experts.w_out"
    expected = (values(source)[key][pair[0]] + values(source)[key][pair[1]]) / 2
    torch.testing.assert_close(values(made.stored)[key][at], expected)
    assert "without data=" in made.notes[-1]


def test_with_a_text_the_most_used_lead(stored):
    hits = torch.tensor([[1.0, 9, 1, 1, 8, 1, 1, 1], [7.0, 1, 1, 1, 1, 1, 1, 6]]).double()
    made = Merge(experts=2).make(Mixture.of(stored()), Usage((0, 1), hits, hits, 20), None, CPU)
    assert [[group[0] for group in made.layers[layer]] for layer in (0, 1)] == [[1, 4], [0, 7]]


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (Merge(experts=1), "experts=1 is out of range, allowed: 2 to 7 of the 8 experts"),
        (Merge(experts=8), "experts=8 is out of range"),
        (Merge(experts=4, by="taste"), "by=taste is unknown, allowed: router, weights, outputs"),
        (Merge(experts=4, by="outputs"), "by=outputs needs a text to run the model on, allowed: data=CORPUS"),
        (Merge(experts=4, grouping="dominant"), "grouping=dominant needs a text"),
        (Merge(experts=4, grouping="random"), "grouping=random is unknown, allowed: dominant, hierarchical"),
    ],
)
def test_a_mistake_is_named_in_one_line(stored, operation, message):
    with pytest.raises(ConfigError, match=message) as error:
        operation.check(Mixture.of(stored()), False)
    assert "\n" not in str(error.value)
