import pytest
import torch

from scatterfold import ConfigError
from scatterfold.moe.blocks import YarnScaling
from scatterfold.moe.build import ModelPlan


def config(**model):
    return {
        "model": {
            "vocab_size": None,
            "layers": 2,
            "width": 16,
            "heads": 4,
            "expert_width": 12,
            "ffn_width": 24,
            "num_experts": 4,
            **model,
        },
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2},
        "experts": {"_target_": "scatterfold.moe.Experts", "activation": "geglu", "backend": None},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
    }


def test_a_config_becomes_a_model():
    plan = ModelPlan.from_config(config(), vocab_size=30)
    model = plan.make_model("selective")
    assert model.blocks["0"].mlp.experts.activation == "geglu"
    assert model.blocks["0"].mlp.router.top_k == 2
    assert model.blocks["0"].checkpointing == "selective"
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 30)
    assert plan.is_moe and plan.counts().total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("num_experts", [0, 1])
def test_zero_or_one_expert_is_a_dense_model_that_needs_no_router(num_experts):
    node = config(num_experts=num_experts)
    node["router"] = node["experts"] = node["dispatcher"] = None
    plan = ModelPlan.from_config(node, vocab_size=30)
    assert not plan.is_moe
    assert plan.make_model().moe_layers() == []
    assert plan.counts().total == plan.counts().active


def test_lists_and_nested_objects_are_converted():
    scaling = {"_target_": "scatterfold.moe.blocks.YarnScaling", "factor": 4, "original_positions": 512}
    plan = ModelPlan.from_config(config(moe_layers=[1], rope_scaling=scaling, rope_theta=10000), vocab_size=30)
    assert plan.config.moe_layers == (1,)
    assert plan.config.rope_scaling == YarnScaling(4.0, 512)
    assert isinstance(plan.config.rope_theta, float)


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("model", {"widht": 16}, "model.widht=16 is not a known key, did you mean width?"),
        ("model", {"layers": "two"}, "model.layers='two' is of the wrong type, allowed: a whole number"),
        ("model", {"layers": True}, "model.layers=true is of the wrong type"),
        ("model", {"heads": 5}, "model.heads=5 does not divide model.width=16"),
        ("model", {"vocab_size": 20}, "model.vocab_size=20 is smaller than the tokenizer's vocabulary, allowed: 30"),
        ("model", {"rope_scaling": {"factor": 2}}, "model.rope_scaling={'factor': 2} is of the wrong type"),
        ("router", {"top_k": 9}, "router.top_k=9 is larger than model.num_experts=4"),
        ("router", {"num_experts": 4}, "router.num_experts=4 cannot be set here"),
        ("router", {"topk": 1}, "router.topk=1 is not a known key, did you mean top_k?"),
        ("experts", {"activation": "swiglue"}, "activation='swiglue' is unknown"),
        ("experts", {"backend": "cuda"}, "experts.backend='cuda' is unknown"),
        ("dispatcher", {"_target_": "scatterfold.parallel.dispatchers.Nowhere"}, "dispatchers has no Nowhere"),
    ],
)
def test_every_mistake_is_named_in_one_line(where, change, message):
    node = config()
    node[where] = {**node[where], **change}
    with pytest.raises(ConfigError) as error:
        ModelPlan.from_config(node, vocab_size=30)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_without_a_tokenizer_the_vocabulary_must_be_given():
    with pytest.raises(ConfigError, match="model.vocab_size=null needs a tokenizer"):
        ModelPlan.from_config(config())
    assert ModelPlan.from_config(config(vocab_size=50), vocab_size=30).config.vocab_size == 50
