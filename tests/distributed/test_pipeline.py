"""Pipeline schedules learn what one process learns: loss, every gradient, each auxiliary loss, router statistics.

Each world is started once; its ranks run all cases and save what they found for the tests to compare with the whole
model in this process.
"""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from meshes_of import meshes_of

from scatterfold.kernels import ConfigError
from scatterfold.moe.build import ModelPlan
from scatterfold.moe.context import StepContext
from scatterfold.moe.models.transformer import Transformer
from scatterfold.moe.training.router_statistics import RouterStatistics
from scatterfold.parallel import Layout
from scatterfold.parallel.pipeline.pipeline import Pipeline
from scatterfold.parallel.pipeline.stages import PipelineSchedule, split_layers
from scatterfold.parallel.pipeline.torch_pipelining import Stage, can_split_backward
from scatterfold.parallel.process import barrier, running, sum_over_ranks

pytestmark = pytest.mark.distributed

ROWS, LENGTH, VOCAB, WIDTH = 2, 12, 29, 16
LAYERS = {2: 5, 4: 9}  # by ranks: two stages each, and one more, so that stages are unequal
BALANCE, SEQUENCE, GLOBAL, Z = "balance_micro_batch", "balance_sequence", "balance_global_batch", "z_loss"
LOSSES = {BALANCE: 0.1, SEQUENCE: 0.1, GLOBAL: 0.1, Z: 0.05}
SCHEDULES = {
    "gpipe": PipelineSchedule("gpipe"),
    "1f1b": PipelineSchedule("1f1b"),
    "interleaved": PipelineSchedule("interleaved"),
    "zero_bubble": PipelineSchedule("zero_bubble"),
    "zero_bubble of two parts": PipelineSchedule("zero_bubble", virtual_stages=2),
    "zero_bubble_v": PipelineSchedule("zero_bubble_v"),
}
STEPS = 2


def plan(layers, **losses):
    return ModelPlan.from_config(
        {
            "model": {
                "vocab_size": VOCAB,
                "layers": layers,
                "width": WIDTH,
                "heads": 2,
                "kv_heads": 1,
                "ffn_width": 24,
                "expert_width": 8,
                "num_experts": 5,
                "first_k_dense": 1,
                "shared_expert_width": 8,
                "qk_norm": "head",
                "max_positions": LENGTH,
            },
            "router": {
                "_target_": "scatterfold.moe.routers.TopKRouter",
                "top_k": 2,
                "gate_bias": True,
                **{BALANCE: 0.0, SEQUENCE: 0.0, GLOBAL: 0.0, Z: 0.0, **losses},
            },
            "experts": {"_target_": "scatterfold.moe.Experts"},
            "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
        }
    )


def make_part(losses, layers, held=None, checkpointing="none"):
    """A part of the model, or all of it; biases skew the routing."""
    described = plan(layers, **losses)
    part = Transformer(described.config, described.make_router, described.make_experts, None, checkpointing, 3, held)
    for _, layer in part.moe_layers():
        layer.router.bias.data.copy_(torch.linspace(0.0, 1.0, 5))
    return part


def micro_batches(step, count, statistics):
    """Documents of different lengths in each micro-batch; some targets masked."""
    generator = torch.Generator().manual_seed(step)
    for index in range(count):
        tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
        labels = tokens.roll(-1, dims=1).masked_fill(torch.rand(tokens.shape, generator=generator) < 0.2, -100)
        cuts = {0, LENGTH, ROWS * LENGTH, 1 + 3 * index % LENGTH, LENGTH + 2 + index % 7}
        yield {
            "tokens": tokens,
            "labels": labels,
            "cu_seqlens": torch.tensor(sorted(cuts), dtype=torch.int32) if index % 3 else None,
            "context": StepContext(ROWS, count * tokens.numel(), statistics),
        }


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def learn(step_of, parts, count):
    """Two steps, gradients adding up within one and cleared between; what the second one gives."""
    layers = [layer for part in parts for layer, _ in part.moe_layers()]
    statistics = RouterStatistics(layers, 5)
    found = {}
    for step in range(STEPS):
        for part in parts:
            part.zero_grad()
        found["loss"] = step_of(list(micro_batches(step, count, statistics)), 1 / 50)
        reduced = statistics.reduce(lambda tensor: tensor)
        for row, (_, layer) in enumerate(pair for part in parts for pair in part.moe_layers()):
            layer.router.finish_step(reduced.counts[row])
    found["gradients"] = {name: p.grad.clone() for part in parts for name, p in part.named_parameters()}
    found["statistics"] = {record["layer"]: record for record in reduced.per_layer()}
    return found


def run_alone(model, context=contextlib.nullcontext):
    def step_of(batches, scale):
        total = 0.0
        for batch in batches:
            with context():
                loss = model(**batch) * scale
            loss.backward()
            total += loss.item()
        return total

    return step_of


def cases(world):
    """Name, schedule, auxiliary losses, micro-batches of a step, checkpointing."""
    schedules = {
        name: schedule for name, schedule in SCHEDULES.items() if can_split_backward() or not schedule.splits_backward
    }
    for name, schedule in schedules.items():
        yield name, schedule, LOSSES, 2 * world, "none"
        if name in ("1f1b", "zero_bubble_v"):
            yield f"{name}, few micro-batches", schedule, LOSSES, world, "none"
    yield "uneven", PipelineSchedule("1f1b"), LOSSES, 2 * world + 1, "none"
    yield "fewer micro-batches than stages", PipelineSchedule("gpipe"), LOSSES, 1, "none"
    if world == 2:
        for checkpointing in ("full", "selective"):
            yield checkpointing, PipelineSchedule("1f1b"), LOSSES, 4, checkpointing
            yield f"interleaved, {checkpointing}", PipelineSchedule("interleaved"), LOSSES, 4, checkpointing
        for loss, coefficient in LOSSES.items():
            for name in [name for name in ("1f1b", "zero_bubble") if name in schedules]:
                yield f"{name}, {loss}", schedules[name], {loss: coefficient}, 4, "none"


def make_pipeline(process, meshes, schedule, losses=LOSSES, checkpointing="none", **options):
    layers = LAYERS[process.world]
    split = split_layers([1.0] * layers, schedule.stages(process.world), last=1.0)
    held = schedule.stages_of(process.rank, process.world)
    parts = [make_part(losses, layers, split[stage], checkpointing) for stage in held]
    return Pipeline(parts, meshes, schedule, process.device, **options), parts


def count_buffers(process, meshes, schedule, micro_batches):
    """The largest number of received hidden states that a rank holds at once."""
    most, receive = 0, Stage.get_fwd_recv_ops

    def counting(self, number):
        nonlocal most
        operations = receive(self, number)
        held = [info for infos in self.args_recv_info.values() for info in infos if info.buffer.numel()]
        most = max(most, len(held))
        return operations

    Stage.get_fwd_recv_ops = counting
    make_pipeline(process, meshes, schedule)[0].run(micro_batches, 1.0)
    Stage.get_fwd_recv_ops = receive
    return most


def check_errors(process, pipeline, part, micro_batches):
    """What can be said is said before anybody waits for anybody, and in our words."""
    longer = {**micro_batches[0], "tokens": torch.zeros(ROWS, LENGTH + 1, dtype=torch.int64)}
    with pytest.raises(ValueError, match="a pipeline needs one shape"):
        pipeline.run([*micro_batches[1:], longer], 1.0)
    if process.is_main:

        def refuse(*_):
            raise ConfigError("model.width=17 is odd")

        part.register_forward_pre_hook(refuse)
        with pytest.raises(ConfigError, match="model.width=17 is odd"):
            pipeline.run(micro_batches, 1.0)


def in_ranks(folder):
    with running("cpu", timeout_s=60) as process:
        meshes = meshes_of(Layout(pp=process.world), process)
        found = {}
        for name, schedule, losses, count, checkpointing in cases(process.world):
            pipeline, parts = make_pipeline(process, meshes, schedule, losses, checkpointing)
            found[name] = learn(pipeline.run, parts, count)
            found[name]["loss"] = sum_over_ranks(found[name]["loss"])
            for part in parts:
                part.eval()
            evaluated = [pipeline.evaluate(batch) for batch in micro_batches(7, 3, None)]
            found[name]["evaluation"] = [sum_over_ranks(loss) for loss in evaluated]
        if process.world == 2:
            pipeline, parts = make_pipeline(process, meshes, PipelineSchedule(), forward_context=bfloat16)
            found["bf16"] = learn(pipeline.run, parts, 4)
            batches = list(micro_batches(0, 4, None))
            found["buffers"] = {
                name: count_buffers(process, meshes, PipelineSchedule(name), batches) for name in ("1f1b", "gpipe")
            }
            check_errors(process, pipeline, parts[0], batches)
        torch.save(found, Path(folder) / f"{process.world}-{process.rank}.pt")
        barrier()


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_ranks):
    """What each rank of a world found, by the name of the case."""
    folder, found = tmp_path_factory.mktemp("pipeline"), {}
    for world in (2, 4):
        run_ranks(world, __file__, "in_ranks", folder)
        found[world] = [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
    return found


@pytest.fixture(scope="module")
def alone():
    """What one process finds, by layers, auxiliary losses and number of micro-batches."""
    found = {}

    def get(layers, losses, count):
        key = layers, tuple(losses.items()), count
        if key not in found:
            model = make_part(losses, layers)
            found[key] = learn(run_alone(model), [model], count)
            model.eval()
            with torch.no_grad():
                found[key]["evaluation"] = [model(**batch) for batch in micro_batches(7, 3, None)]
        return found[key]

    return get


CASES = [pytest.param(world, *case, id=f"{world} ranks, {case[0]}") for world in (2, 4) for case in cases(world)]


@pytest.mark.parametrize(("world", "name", "schedule", "losses", "count", "checkpointing"), CASES)
def test_learns_what_one_process_learns(found, alone, world, name, schedule, losses, count, checkpointing):
    there = alone(LAYERS[world], losses, count)
    here = [rank[name] for rank in found[world]]
    for own in here:
        torch.testing.assert_close(float(own["loss"]), there["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(
            [float(loss) for loss in own["evaluation"]],
            [float(loss) for loss in there["evaluation"]],
            rtol=1e-6,
            atol=0,
        )
    gradients = {key: gradient for own in here for key, gradient in own["gradients"].items()}
    assert sum(len(own["gradients"]) for own in here) == len(there["gradients"])  # each parameter on one rank
    torch.testing.assert_close({key: gradients[key] for key in there["gradients"]}, there["gradients"])
    statistics = {key: record for own in here for key, record in own["statistics"].items()}
    assert statistics.keys() == there["statistics"].keys()
    for layer, record in there["statistics"].items():
        torch.testing.assert_close(statistics[layer], record, rtol=1e-5, atol=1e-7)


def test_bf16_is_that_of_one_process(found):
    """Hidden states pass between ranks as they are, so nothing is rounded twice."""
    model = make_part(LOSSES, LAYERS[2])
    there = learn(run_alone(model, bfloat16), [model], 4)["gradients"]
    for rank in found[2]:
        here = rank["bf16"]["gradients"]
        torch.testing.assert_close(here, {name: there[name] for name in here}, rtol=1e-5, atol=1e-7)


def test_received_states_live_as_long_as_the_schedule_needs(found):
    """1F1B: at most pp - i micro-batches are in flight on rank i; GPipe: all of them."""
    assert found[2][1]["buffers"] == {"1f1b": 1, "gpipe": 4}


def test_auxiliary_losses_move_gradients(alone):
    """Each of them alone, and by more than the tolerance: a lost one would be seen."""
    without = alone(LAYERS[2], {}, 4)["gradients"]
    for loss, coefficient in LOSSES.items():
        moved = alone(LAYERS[2], {loss: coefficient}, 4)["gradients"]
        for layer in (1, LAYERS[2] - 1):
            name = f"blocks.{layer}.mlp.router.weight"
            assert (moved[name] - without[name]).abs().max() > 1e-3 * without[name].abs().max(), (loss, layer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
