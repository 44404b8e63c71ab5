"""What a layer keeps, by formula, against what autograd really saves."""

import pytest
import torch
from jobs import config, job
from torch.autograd.graph import saved_tensors_hooks

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.estimate.activations import kept_by_layer, whole_layer

MODELS = {
    "moe": {},
    "dense": {"num_experts": 0},
    "relu2": {"num_experts": 0, "activation": "relu2"},
    "reglu": {"num_experts": 0, "activation": "reglu"},
    "norms of heads": {"qk_norm": "head"},
    "norms of projections": {"qk_norm": "projection", "shared_expert_width": 8},
    "gated shared expert": {"shared_expert_width": 8, "shared_expert_gate": True},
}


def saved_bytes(model, changes, packed):
    """Bytes that a forward pass saves, each memory once and weights not at all: (in all, casts of weights)."""
    plan = ModelPlan.from_config(config(model=model, **changes))
    built = plan.make_model((changes.get("trainer") or {}).get("activation_checkpointing", "none"))
    weights = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    shapes = {tuple(p.shape) for p in built.parameters()} | {
        tuple(p.flatten(1, 2).shape) for p in built.parameters() if p.ndim == 4
    }
    seen, casts, alive = {}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(tensor)  # so that no other takes its place
            found = casts if tuple(tensor.shape) in shapes and tensor.dtype == torch.bfloat16 else seen
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 257, (8, 32))
    documents = torch.tensor([*range(0, 256, 32), 5, 70, 131, 256]).sort().values.int() if packed else None
    precision = (changes.get("trainer") or {}).get("precision")
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
        built(tokens, tokens, cu_seqlens=documents)
    return sum(seen.values())


def of_one_layer(model, changes, packed):
    """The difference that one layer more makes."""
    return saved_bytes({**model, "layers": 2}, changes, packed) - saved_bytes({**model, "layers": 1}, changes, packed)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("trainer", "packed"),
    [({}, False), ({}, True), ({"precision": "bf16"}, False), ({"activation_checkpointing": "selective"}, False)],
)
def test_bytes_of_a_layer(name, trainer, packed):
    model = MODELS[name]
    changes = {"trainer": trainer, "data": {"pack_documents": packed}}
    estimated = job(model=model, **changes)
    kept = kept_by_layer(estimated, 1)
    assert kept.dispatch == 0
    decision = 8 * estimated.tokens * 2 if "activation_checkpointing" in trainer and "num_experts" not in model else 0
    # A few offsets of experts and losses are left out.
    assert kept.total - decision == pytest.approx(of_one_layer(model, changes, packed), rel=0.01)


def test_recomputed_layers_keep_their_input_and_the_decision():
    changes = {"trainer": {"activation_checkpointing": "full"}}
    estimated = job(**changes)
    decision = 8 * estimated.tokens * 2
    assert kept_by_layer(estimated, 0).total == 4 * estimated.tokens * 32 + decision
    assert of_one_layer({}, changes, False) == 4 * estimated.tokens * 32
    assert whole_layer(estimated, 0) == kept_by_layer(job(), 0)


def test_tensor_parallel_ranks_share_what_is_wide_and_experts_what_arrives():
    alone, cut = (whole_layer(job(2, layout=layout), 0) for layout in ({"dp_shard": 2}, {"tp": 2}))
    assert cut.dispatch == 0 and cut.total != alone.total
    spread = whole_layer(job(2, layout={"ep": 2}), 0)
    assert spread.dispatch > 4 * job(2, layout={"ep": 2}).rows * 32
