"""What a layer keeps, by formula, against what autograd really saves."""

import pytest
import torch
from jobs import config, job
from torch.autograd.graph import saved_tensors_hooks

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.estimate.activations import kept_by_layer, whole_layer
from scatterfold.moe.estimate.state import RankState

MODELS = {
    "moe": {},
    "dense": {"num_experts": 0},
    "relu2": {"num_experts": 0, "activation": "relu2"},
    "reglu": {"num_experts": 0, "activation": "reglu"},
    "clamped swiglu": {"num_experts": 0, "activation": "clamped_swiglu"},
    "relu": {"num_experts": 0, "activation": "relu"},
    "norms of heads": {"qk_norm": "head"},
    "norms of projections": {"qk_norm": "projection", "shared_expert_width": 8},
    "gated shared expert": {"shared_expert_width": 8, "shared_expert_gate": True},
}


def saved_bytes(model, changes, packed):
    """Bytes that a forward pass saves, each memory once and weights not at all: (activations, casts of weights)."""
    plan = ModelPlan.from_config(config(model=model, **changes))
    built = plan.make_model((changes.get("trainer") or {}).get("activation_checkpointing", "none"))
    weights = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    shapes = {tuple(p.shape) for p in built.parameters()} | {
        tuple(p.flatten(1, 2).shape) for p in built.parameters() if p.ndim == 4
    }
    shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}  # a product may keep the transposed view
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
    return sum(seen.values()), sum(casts.values())


def of_one_layer(model, changes, packed):
    """The difference that one layer more makes: (activations, casts of weights)."""
    more, fewer = (saved_bytes({**model, "layers": layers}, changes, packed) for layers in (2, 1))
    return more[0] - fewer[0], more[1] - fewer[1]


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
    saved, casts = of_one_layer(model, changes, packed)
    # A few offsets of experts and losses are left out.
    assert kept.total - decision == pytest.approx(saved, rel=0.01)
    assert RankState.of(estimated).kinds[estimated.kind(1)].cast == casts


def test_a_window_on_a_cpu_keeps_its_mask_and_joins_its_runs():
    changes = {"data": {"pack_documents": False}}
    model = {"num_experts": 0, "sliding_window": 8}
    estimated = job(model=model, **changes)
    assert kept_by_layer(estimated, 1).total == of_one_layer(model, changes, False)[0]
    assert kept_by_layer(job(model={**model, "sliding_window": 32}, **changes), 1) == whole_layer(
        job(model={"num_experts": 0}, **changes), 1
    )


def test_recomputed_layers_keep_their_input_and_the_decision():
    changes = {"trainer": {"activation_checkpointing": "full"}}
    estimated = job(**changes)
    decision = 8 * estimated.tokens * 2
    assert kept_by_layer(estimated, 0).total == 4 * estimated.tokens * 32 + decision
    assert of_one_layer({}, changes, False) == (4 * estimated.tokens * 32, 0)
    assert whole_layer(estimated, 0) == kept_by_layer(job(), 0)


def test_tensor_parallel_ranks_share_what_is_wide_and_experts_what_arrives():
    alone, cut = (whole_layer(job(2, layout=layout), 0) for layout in ({"dp_shard": 2}, {"tp": 2}))
    assert cut.dispatch == 0 and cut.total != alone.total
    spread = whole_layer(job(2, layout={"ep": 2}), 0)
    assert spread.dispatch > 4 * job(2, layout={"ep": 2}).rows * 32
