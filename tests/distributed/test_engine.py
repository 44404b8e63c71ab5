"""Every layout learns what one process learns: loss, gradients, norms, weights.

Each world is started once; its ranks run all cases and rank 0 saves what it found for the tests to compare.
"""

import sys
from pathlib import Path

import pytest
import torch
from meshes_of import meshes_of
from torch import nn
from whole_tensors import whole

from scatterfold.kernels import Routing, moe_mlp
from scatterfold.parallel import Layout, Process
from scatterfold.parallel.engines import TorchEngine
from scatterfold.parallel.plan import ShardingPlan
from scatterfold.parallel.process import running

WIDTH, EXPERTS, TOKENS, STEPS = 12, 5, 8, 3  # 5 experts do not divide by 2 or 4 ranks: shards are uneven, one is empty
MICRO_BATCHES = 4  # of the whole step, over all ranks


class Gate(nn.Module):
    """Routes each token to its best expert, in float32."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, WIDTH))
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            probs = (x.float() @ self.weight.T).softmax(-1)
            weight, expert = (probs + self.bias).max(-1, keepdim=True)
            return Routing.from_topk(expert, weight, EXPERTS)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.gate = Gate()
        self.w_in = nn.Parameter(torch.empty(EXPERTS, 2 * 8, WIDTH))
        self.w_out = nn.Parameter(torch.empty(EXPERTS, WIDTH, 8))

    def forward(self, x):
        x = x + self.mix(self.norm(x))
        return x + moe_mlp(x, self.w_in, self.w_out, self.gate(x))


class Toy(nn.Module):
    """Two MoE blocks between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 16)
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).float(), tokens.roll(-1), reduction="sum")

    def reset_parameters(self, seed):
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(seed * 1000 + sum(name.encode()))
            whole = torch.randn(parameter.shape, generator=generator) * 0.4
            if hasattr(parameter, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.data.copy_(whole)
        for buffer in self.buffers():
            buffer.fill_(0.25)


def micro_batches(step, rank, world):
    """This rank's share of the step's micro-batches."""
    whole = torch.randint(0, 16, (MICRO_BATCHES, TOKENS), generator=torch.Generator().manual_seed(step))
    return whole[rank::world]


def build(process, layout, engine, optimizer, **options):
    with torch.device("meta"):
        model = Toy()
    return engine.prepare(
        model,
        optimizer,
        process=process,
        meshes=meshes_of(layout, process),
        plan=ShardingPlan(units=list(model.blocks), float32=[block.gate for block in model.blocks]),
        seed=3,
        **options,
    )


def train(process, layout, engine=None, optimizer="sgd", max_norm=0.05, **options):
    """A few steps; what can be compared between layouts, as whole tensors."""
    make = {
        "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.001 if max_norm is None else 1.0),
        "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    }[optimizer]
    training = build(process, layout, engine or TorchEngine(), make, **options)
    found = {"initial": whole(dict(training.named_parameters())), "steps": []}
    found["buffers"] = {name: buffer.clone() for name, buffer in training.parts[0].named_buffers()}
    for step in range(STEPS):
        batches = [{"tokens": batch} for batch in micro_batches(step, process.rank, process.world)]
        loss = training.run(batches, scale=1 / (MICRO_BATCHES * TOKENS))
        gradients = whole({name: p.grad for name, p in training.named_parameters()})
        by_name = training.grad_norms_by_parameter()
        norm = training.clip(max_norm)
        clipped = whole({name: p.grad for name, p in training.named_parameters()})
        training.step()
        training.zero_grad()
        found["steps"].append(
            {"loss": loss, "gradients": gradients, "norm": norm, "by_name": by_name, "clipped": clipped}
        )
    found["final"] = whole(dict(training.named_parameters()))
    found["evaluation"] = training.evaluate({"tokens": micro_batches(99, 0, 1)[0]})
    return found


LAYOUTS = {"ddp": Layout(), "fsdp2": Layout(dp_shard=2), "fsdp4": Layout(dp_shard=4), "hsdp": Layout(2, 2)}


def cases(world):
    layouts = {2: ["ddp", "fsdp2"], 4: ["fsdp4", "hsdp"]}[world]
    for name in layouts:
        yield f"{name}/sgd", {"layout": LAYOUTS[name]}
        yield f"{name}/adamw", {"layout": LAYOUTS[name], "optimizer": "adamw"}
        yield f"{name}/bf16", {"layout": LAYOUTS[name], "optimizer": "adamw", "precision": "bf16"}
        yield f"{name}/no_clipping", {"layout": LAYOUTS[name], "max_norm": None}
    yield "ddp/small_buckets", {"layout": Layout(), "engine": TorchEngine(bucket_mb=0.0001)}
    sharded = {"layout": LAYOUTS[layouts[-1]]}
    yield f"{layouts[-1]}/every_micro_batch", sharded | {"engine": TorchEngine(reduce_every_micro_batch=True)}
    yield f"{layouts[-1]}/keep_gathered", sharded | {"engine": TorchEngine(reshard_after_forward=False)}
    if world == 2:
        yield (
            "fsdp2/compile",
            {"layout": LAYOUTS["fsdp2"], "engine": TorchEngine(compile_backend="aot_eager"), "compile": True},
        )


CASES = {world: [name for name, _ in cases(world)] for world in (2, 4)}


def in_ranks(folder):
    import torch.distributed as dist

    with running("cpu", timeout_s=60) as process:
        for name, options in cases(process.world):
            found = train(process, **options)
            for step in found["steps"]:
                dist.all_reduce(step["loss"])
            if process.is_main:
                torch.save(found, Path(folder) / f"{name.replace('/', '_')}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_ranks):
    """Results by world and case name; each world is started when first asked for."""
    results = {}

    def look_up(world, name):
        if world not in results:
            results[world] = tmp_path_factory.mktemp(f"world{world}")
            run_ranks(world, __file__, "in_ranks", results[world])
        return torch.load(results[world] / f"{name.replace('/', '_')}.pt")

    return look_up


@pytest.fixture(scope="module")
def alone():
    memory = {}

    def run(**options):
        key = tuple(sorted(options.items()))
        if key not in memory:
            memory[key] = train(Process(), Layout(), **options)
        return memory[key]

    return run


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "name"), [(world, name) for world in CASES for name in CASES[world]])
def test_layout_learns_what_one_process_learns(found, alone, world, name):
    here = found(world, name)
    kind = name.split("/")[1]
    options = {
        "adamw": {"optimizer": "adamw"},
        "bf16": {"optimizer": "adamw", "precision": "bf16"},
        "no_clipping": {"max_norm": None},
    }.get(kind, {})
    there = alone(**options)
    torch.testing.assert_close(here["initial"], there["initial"], rtol=0, atol=0)
    assert torch.equal(here["buffers"]["table"], torch.full((3,), 0.25))
    torch.testing.assert_close(here["buffers"], there["buffers"], rtol=0, atol=0)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    for one, other in zip(here["steps"], there["steps"]):
        torch.testing.assert_close(one, other, **tolerance)
    torch.testing.assert_close(here["final"], there["final"], **tolerance)
    torch.testing.assert_close(here["evaluation"], there["evaluation"], **tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "name"), [(2, "ddp/bf16"), (2, "fsdp2/bf16"), (4, "hsdp/bf16")])
def test_bf16_forward_is_the_same_in_every_layout(found, alone, world, name):
    """The first loss is the same up to the order of summation: no parameter is rounded where autocast would not."""
    here, there = found(world, name)["steps"][0], alone(optimizer="adamw", precision="bf16")["steps"][0]
    torch.testing.assert_close(here["loss"], there["loss"], rtol=1e-6, atol=0)
    full = alone(optimizer="adamw")["steps"][0]
    assert abs(there["loss"] - full["loss"]) / full["loss"] > 1e-5  # the tolerance above can tell precisions apart


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
