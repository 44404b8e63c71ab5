"""Models cut over tensor and context parallel ranks, beside the same model in one process.

`write(process, folder, layout, …)` runs in every rank and writes loss, gradients and router counts of each case, one
file a layout; `alone(case)` computes them in one process. Gradients are summed by hand here, by plain all-reduces, so
that nothing depends on an engine.
"""

import hashlib
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from meshes_of import meshes_of
from torch.distributed.tensor import DTensor
from whole_tensors import whole

from scatterfold import Experts, ModelConfig, TopKRouter, Transformer
from scatterfold.moe.blocks import LatentAttention
from scatterfold.moe.context import StepContext
from scatterfold.parallel import Layout
from scatterfold.parallel.meshes import ALONE
from scatterfold.parallel.plan import ShardingPlan, cut_parameters

ROWS, LENGTH, VOCAB = 2, 32, 29  # the vocabulary divides by no number of ranks
DOCUMENTS = (0, 5, 6, 29, 32, 48, 63, 64)
LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp4": Layout(tp=4),
    "cp2": Layout(cp=2),
    "cp4": Layout(cp=4),
    "cp2_tp2": Layout(cp=2, tp=2),
}
SHAPE = {"vocab_size": VOCAB, "width": 16, "heads": 8, "kv_heads": 4, "head_width": 4, "max_positions": LENGTH}
MOE = {"num_experts": 4, "expert_width": 12, "shared_expert_width": 8}
CASES = {
    "plain": {"layers": 2, "ffn_width": 24},
    "documents, head norms, biases": {
        **{"layers": 2, "ffn_width": 8, "qk_norm": "head", "attention_bias": True, "documents": DOCUMENTS},
    },
    "window, projection norms, tied head": {
        **{"layers": 1, "ffn_width": 8, "qk_norm": "projection", "tie_embeddings": True, "sliding_window": 5},
    },
    "window over documents, no gate": {
        **{"layers": 1, "ffn_width": 8, "activation": "relu2", "sliding_window": 9, "documents": DOCUMENTS},
    },
    "one row": {"layers": 1, "ffn_width": 8, "kv_heads": 8, "rows": 1, "documents": (0, 7, 32)},
    "experts": {"layers": 2, "first_k_dense": 1, "ffn_width": 8, **MOE, "documents": DOCUMENTS},
    "gated shared expert": {"layers": 1, **MOE, "shared_expert_gate": True},
    "balance and capacity": {
        **{"layers": 1, **MOE, "documents": DOCUMENTS},
        "router": {"balance_sequence": 0.5, "balance_micro_batch": 0.5, "capacity_factor": 1.0},
    },
}
LATENT = {"kv_rank": 10, "nope_width": 6, "rope_width": 4, "value_width": 5}
CASES |= {
    "latent attention over documents, biases": {
        **{"layers": 2, "ffn_width": 8, "kv_heads": None, "head_width": None, "documents": DOCUMENTS},
        **{"attention_bias": True, "attention_output_bias": True},
        "latent_attention": LatentAttention(**LATENT, q_rank=12),
    },
    "latent attention in a window": {
        **{"layers": 1, "ffn_width": 8, "kv_heads": None, "head_width": None, "sliding_window": 5},
        "latent_attention": LatentAttention(**LATENT, interleaved=False),
    },
    "sinks, windows of some layers, biases, half of a head turns": {
        **{"layers": 2, "ffn_width": 8, "attention_sinks": True, "attention_bias": True, "rotary_width": 2},
        **{"attention_output_bias": True, "sliding_window": 5, "window_layers": (1,), "documents": DOCUMENTS},
    },
    "clamped gates": {**{"layers": 1, **MOE}, "activation": "clamped_swiglu"},
}
RECOMPUTED = {
    "experts, full": {**CASES["experts"], "checkpointing": "full"},
    "experts, selective": {**CASES["experts"], "checkpointing": "selective"},
    "experts, offload": {**CASES["experts"], "offload": True},
    "experts, full, offload": {**CASES["experts"], "checkpointing": "full", "offload": True},
}
COMPILED = {"compiled": {**CASES["window, projection norms, tied head"], "documents": DOCUMENTS, "compile": True}}
OPTIONS = ("rows", "documents", "router", "checkpointing", "offload", "compile")


def cases_of(layout):
    return {**CASES, **RECOMPUTED, **(COMPILED if layout in ("tp2", "cp2") else {})}


def make(case, meshes=ALONE):
    config = ModelConfig(**SHAPE | {name: value for name, value in case.items() if name not in OPTIONS})
    return Transformer(
        config,
        router=partial(TopKRouter, config.width, config.num_experts, 2, z_loss=0.1, **case.get("router", {})),
        experts=partial(Experts, config.num_experts, config.width, config.expert_width),
        checkpointing=case.get("checkpointing", "none"),
        activation_offload=case.get("offload", False),
        meshes=meshes,
    )


@torch.no_grad()
def disturb(model):
    """Norms other than one, biases other than zero, and a router that is sure; the same in every process."""
    for name, parameter in model.named_parameters():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.add_(noise, alpha=0.3)


class Counts:
    def __init__(self):
        self.calls, self.total = 0, 0

    def record(self, index, routed, num_tokens):
        self.calls += 1
        self.total = self.total + routed.counts


def loss_of(model, case, statistics):
    rows = case.get("rows", ROWS)
    tokens = torch.randint(0, VOCAB, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(rows))
    labels = tokens[:, 1:].clone()
    labels[0, 3:9] = -100
    cu_seqlens = None if "documents" not in case else torch.tensor(case["documents"], dtype=torch.int32)
    context = StepContext(global_tokens=rows * LENGTH, statistics=statistics)
    return model(tokens[:, :-1], labels, cu_seqlens, context) / (labels != -100).sum()


def alone(case):
    """Loss, gradients and router counts of one process."""
    model, statistics = make({**case, "checkpointing": "none", "offload": False}), Counts()
    disturb(model)
    loss = loss_of(model, case, statistics)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "gradients": gradients, "counts": statistics.total, "calls": statistics.calls}


def cut(case, meshes):
    """The same of all ranks together."""
    model, statistics = make(case, meshes), Counts()
    disturb(model)
    cut_parameters(model, ShardingPlan(tensor_styles=model.tensor_styles()), meshes)
    if case.get("compile"):
        for block in model.sharding_units():
            block.compile(backend="aot_eager")
    loss = loss_of(model, case, statistics)
    loss.backward()
    gradients = whole({name: summed_gradient(parameter, meshes) for name, parameter in model.named_parameters()})
    loss = loss.detach() / meshes.layout.tp
    dist.all_reduce(loss)
    counts = statistics.total
    if torch.is_tensor(counts):
        dist.all_reduce(counts)
    return {"loss": loss, "gradients": gradients, "counts": counts, "calls": statistics.calls}


def summed_gradient(parameter, meshes):
    """What is cut over tp is summed over cp, what is whole over all ranks."""
    gradient = parameter.grad
    if not isinstance(parameter, DTensor):
        dist.all_reduce(gradient)
        return gradient
    assert gradient.placements == parameter.placements
    if meshes.cp is not None:
        dist.all_reduce(gradient.to_local(), group=meshes.cp.get_group())
    return gradient


def write(process, folder, *names):
    for name in names:
        meshes = meshes_of(LAYOUTS[name], process)
        found = {case: cut(settings, meshes) for case, settings in cases_of(name).items()}
        if process.is_main:
            torch.save(found, Path(folder) / f"{name}.pt")


def assert_same(found, expected, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=0)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=rtol, atol=atol, msg=name)
    assert found["calls"] == expected["calls"]
    assert torch.equal(torch.as_tensor(found["counts"]), torch.as_tensor(expected["counts"]))
