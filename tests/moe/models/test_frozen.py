"""`model.frozen`: which parameters it names, what they cost, and what is refused."""

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.training.optimizers import AdamW


def plan(*frozen, **model):
    return ModelPlan.from_config(
        {
            "model": {
                "vocab_size": 30, "layers": 3, "width": 16, "heads": 4, "expert_width": 12, "ffn_width": 24,
                "num_experts": 4, "first_k_dense": 1, "max_positions": 16, "frozen": list(frozen), **model,
            },
            "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 1, "renormalise": False},
            "experts": {"_target_": "scatterfold.moe.Experts"},
            "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
        }
    )  # fmt: skip


def frozen_names(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_a_star_stands_for_dots_and_a_pattern_for_a_whole_name():
    model = plan("blocks.*.attention.w[qk].*", "norm.weight", "blocks.1.*").make_model()
    names = {name for name, _ in model.named_parameters()}
    expected = {name for name in names if name.startswith("blocks.1.")} | {"norm.weight"}
    expected |= {f"blocks.{i}.attention.{w}.weight" for i in (0, 2) for w in ("wq", "wk")}
    assert frozen_names(model) == expected


def test_a_part_of_the_model_freezes_what_it_has():
    made = plan("blocks.0.*", "head.weight")
    assert frozen_names(made.make_model(layers=[1, 2])) == {"head.weight"}
    assert {name.split(".")[1] for name in frozen_names(made.make_model(layers=[0, 1]))} == {"0"}


def test_no_gradient_no_state_no_decay():
    model = plan("blocks.*.experts.*", "embedding.*").make_model()
    optimizer = AdamW(lr=0.1, weight_decay=0.5)(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(0, 30, (2, 16))
    model(tokens, tokens.roll(-1, 1)).backward()
    optimizer.step()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_frozen = name == "embedding.weight" or ".experts." in name
        assert (parameter.grad is None) == is_frozen == torch.equal(parameter, before[name]), name
        assert (id(parameter) in held) == (not is_frozen)


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_matrix_saves_a_third_of_its_operations(tied):
    """Of 6 operations a weight, the 2 for its own gradient; of experts, the share that a token uses."""
    all_trained = plan(tie_embeddings=tied).counts()
    counts = plan("blocks.*.experts.*", "embedding.weight", tie_embeddings=tied).counts()
    expert = 3 * 16 * 12
    saved = 2 * 2 * expert + (2 * 30 * 16 if tied else 0)  # two MoE layers, one expert each; a lookup saves nothing
    assert counts.flops_per_token == all_trained.flops_per_token - saved
    assert (counts.total, counts.active) == (all_trained.total, all_trained.active)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (
            ["blocks.*.attn.*"],
            r"model.frozen=blocks.\*.attn.\* matches no parameter, allowed: patterns of names such as",
        ),
        (["head.*", "blocks.3.*"], r"model.frozen=blocks.3.\* matches no parameter"),
        (["*"], r"model.frozen=\['\*'\] leaves nothing to train"),
    ],
)
def test_a_mistake_is_named_in_one_line(frozen, message):
    with pytest.raises(ConfigError, match=message) as error:
        plan(*frozen)
    assert "\n" not in str(error.value)


def test_text_is_not_a_list():
    with pytest.raises(ConfigError, match="model.frozen='head' is of the wrong type, allowed: a list, each text"):
        plan(frozen="head")
