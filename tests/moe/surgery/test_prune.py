"""Pruning against experts removed by hand, and what it promises about combine weights."""

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.moe.surgery.mixture import Mixture
from scatterfold.moe.surgery.operations import Prune
from scatterfold.moe.surgery.prune import most_used, prune

KEPT = {0: [1, 2, 4, 7], 1: [0, 3, 4, 5]}
# By this bias of the logits, none but the kept experts is ever chosen, though the others hold some mass.
UNCHOSEN = {
    f"blocks.{layer}.mlp.router.bias": torch.tensor([0.0 if expert in kept else -60.0 for expert in range(8)])
    for layer, kept in KEPT.items()
}
EXACT = {
    "renormalised": {},
    "sigmoid": {"score": "sigmoid", "renormalise": False, "scale": 1.7},
    "sigmoid, renormalised, biased": {"score": "sigmoid", "bias_rate": 0.001},
    "after": {"score": "softmax_after"},
    "threshold": {"threshold": 0.6, "renormalise": True, "max_experts": 4},
}


@pytest.mark.parametrize("experts", [{}, {"_target_": "scatterfold.moe.AdapterExperts", "adapter_width": 5}])
@pytest.mark.parametrize("name", EXACT)
def test_experts_that_nobody_chooses_leave_without_a_trace(stored, logits, values, name, experts):
    router = {"gate_bias": True, "balance_global_batch": 0.1, **EXACT[name]}
    biases = {f"{key.removesuffix('bias')}expert_bias": bias / 10 for key, bias in UNCHOSEN.items()}
    tensors = {**UNCHOSEN, **(biases if "bias_rate" in router else {})}
    source = stored(router, experts, tensors, shared_expert_width=6)
    result = prune(Mixture.of(source), KEPT)
    torch.testing.assert_close(logits(result), logits(source), rtol=1e-5, atol=1e-5)
    before, after = values(source), values(result)
    for key, value in after.items():
        cut = ".router." in key or (".experts." in key and ".ffn." not in key)
        assert torch.equal(value, before[key][KEPT[int(key.split(".")[1])]] if cut else before[key]), key
    assert before.keys() == after.keys() and result.checked().plan().config.num_experts == 4


@pytest.mark.parametrize(
    "router", [{}, {"renormalise": False}, {"threshold": 0.3}, {"score": "sigmoid", "renormalise": False}]
)
def test_weights_of_tokens_whose_experts_are_all_kept(stored, router):
    """Raw softmax weights grow by 1 / (1 - pruned mass); sigmoid scores and renormalised weights stay."""
    source = stored(router, layers=1)
    kept = KEPT[0]
    result = prune(Mixture.of(source), {0: kept})
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    routed = [model.build().moe_layers()[0][1].router(x).routing for model in (source, result)]
    weights = [routing.weight.detach() for routing in routed]
    before, after = ({} for _ in routed)
    for routing, weight, found, ids in zip(routed, weights, (before, after), (list(range(8)), kept)):
        for expert, (start, stop) in enumerate(zip(routing.expert_offsets[:-1], routing.expert_offsets[1:])):
            for n in range(int(start), int(stop)):
                found.setdefault(int(routing.token[n]), {})[ids[expert]] = float(weight[n])
    mass = (x @ source.tensors["blocks.0.mlp.router.weight"].read().T).softmax(-1)
    mass = mass[:, [expert for expert in range(8) if expert not in kept]].sum(-1)
    same = [
        token for token, chosen in before.items() if set(chosen) <= set(kept) and chosen.keys() == after[token].keys()
    ]
    assert len(same) > 20 and mass[same].max() > 0.05
    grows = router == {"renormalise": False} or "threshold" in router
    for token in same:
        factor = 1 / (1 - float(mass[token])) if grows else 1.0
        for expert, weight in before[token].items():
            assert after[token][expert] == pytest.approx(weight * factor, rel=1e-5)


def test_an_explicit_list_is_kept_in_every_layer(stored):
    source = stored(layers=3, first_k_dense=1)
    made = Prune(experts=(6, 2, 3)).make(Mixture.of(source), None, None, torch.device("cpu"))
    assert made.layers == {1: [[2], [3], [6]], 2: [[2], [3], [6]]} and made.notes == ()
    assert made.stored.checked().plan().config.num_experts == 3


def test_experts_per_token_are_lowered_to_what_is_left(stored):
    source = stored({"top_k": 6, "eval_top_k": 4})
    made = Prune(experts=(0, 1, 2)).make(Mixture.of(source), None, None, torch.device("cpu"))
    router = made.stored.config["router"]
    assert (router["top_k"], router["eval_top_k"]) == (3, 3)
    assert made.notes == ("router.top_k is 3, it was 6", "router.eval_top_k is 3, it was 4")
    of_threshold = stored({"threshold": 0.5, "max_experts": 5})
    made = Prune(experts=(0, 1, 2)).make(Mixture.of(of_threshold), None, None, torch.device("cpu"))
    assert made.stored.config["router"]["max_experts"] == 3
    assert made.notes[0] == "router.max_experts is 3, it was 5"
    assert made.notes[1].startswith("combine weights grow by 1 / (1 - mass")


def test_top_k_may_be_asked_for_and_keeps_its_kind_of_weights(stored):
    source = stored({"top_k": 2, "balance_micro_batch": 0.1})  # renormalise=null means yes, for top_k=2
    made = Prune(experts=(0, 1, 2), top_k=1).make(Mixture.of(source), None, None, torch.device("cpu"))
    assert made.stored.config["router"] | {"top_k": 1, "renormalise": True} == made.stored.config["router"]


def test_groups_of_a_router_keep_as_many_each(stored):
    source = stored({"num_groups": 2, "top_groups": 1})
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 0.1, 0.2, 0.2, 0.0])
    mixture = Mixture.of(source)
    assert most_used(mixture, {0: scores, 1: scores.flip(0)}, 4) == {0: [0, 1, 5, 6], 1: [1, 2, 6, 7]}
    with pytest.raises(ConfigError, match="keep=3 does not divide over router.num_groups=2"):
        most_used(mixture, {0: scores, 1: scores}, 3)
    with pytest.raises(ConfigError, match=r"experts=\[0, 1, 2, 5\] keeps 1 to 3 experts of a group"):
        Prune(experts=(0, 1, 2, 5)).check(mixture, False)
    made = Prune(experts=(0, 3, 5, 6)).make(mixture, None, None, torch.device("cpu"))
    assert made.stored.checked().plan().make_router().num_groups == 2


def test_of_equally_used_experts_the_lowest_ids_stay(stored):
    scores = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1])
    assert most_used(Mixture.of(stored()), dict.fromkeys((0, 1), scores), 3) == {0: [0, 1, 3], 1: [0, 1, 3]}


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (Prune(), "keep is missing, allowed: keep=N, or experts="),
        (Prune(keep=4), "keep=4 goes by the use of the experts, allowed: data=CORPUS"),
        (Prune(experts=(1, 8)), r"experts=\[1, 8\] names 8, allowed: 0 to 7"),
        (Prune(experts=(1, 1)), "each once"),
        (Prune(keep=3, experts=(1, 2)), "keep=3 with experts="),
        (Prune(experts=tuple(range(8))), "keep=8 is out of range, allowed: 1 to 7 of the 8 experts"),
        (Prune(experts=(1,), top_k=1), "top_k=1 does not go with keep=1"),
        (Prune(experts=(1, 2), criterion="size"), "criterion=size is unknown"),
    ],
)
def test_a_mistake_is_named_in_one_line(stored, operation, message):
    with pytest.raises(ConfigError, match=message) as error:
        operation.check(Mixture.of(stored()), False)
    assert "\n" not in str(error.value)


def test_a_dense_model_and_an_unknown_router_are_refused(stored):
    with pytest.raises(ConfigError, match="model.num_experts=0 of source is a dense model"):
        Mixture.of(stored(num_experts=0))
    source = stored()
    config = {**source.config, "router": {"_target_": f"{__name__}.OwnRouter", "top_k": 2}}
    with pytest.raises(ConfigError, match="OwnRouter cannot be given other experts, allowed: TopKRouter"):
        Mixture.of(source.with_model(config, source.tensors))


def OwnRouter(width, num_experts, top_k):
    from scatterfold.moe import TopKRouter

    class Other(TopKRouter):
        pass

    return Other(width, num_experts, top_k)
