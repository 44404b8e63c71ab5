"""What ranks of test_megatron.py do with Megatron-Core, one layout after another.

    python megatron_ranks.py FOLDER

imports once, then forks the ranks of each world: gloo does not survive a fork, imports do. FOLDER/<case>/<rank>.pt gets
losses and gradients by our names.
"""

import importlib.util
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.context import StepContext
from scatterfold.parallel.context.zigzag import own_part
from scatterfold.parallel.layout import ResolvedLayout

TESTS = Path(__file__).parents[1]
NEAR = TESTS / "moe/interop/megatron/conftest.py"
ROWS, LENGTH, PASSES = 2, 16, 4  # a step is four micro-batches of two sequences, over all data parallel ranks
ROUTER = {
    "_target_": "scatterfold.moe.routers.TopKRouter",
    "top_k": 2,
    "score": "sigmoid",
    "bias_rate": 0.05,
    "balance_micro_batch": 0.2,
    "balance_sequence": 0.3,
    "balance_global_batch": 0.1,
    "z_loss": 0.1,
}
CONFIG = {
    "model": {
        "vocab_size": 32,
        "layers": 4,
        "width": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 6,
        "ffn_width": 12,
        "expert_width": 8,
        "num_experts": 4,
        "moe_layers": [1, 3],
        "shared_expert_width": 8,
        "shared_expert_gate": True,
        "qk_norm": "head",
        "attention_bias": True,
        "sliding_window": 5,
        "window_layers": [2],
        "max_positions": LENGTH,
    },
    "router": ROUTER,
    "experts": {"_target_": "scatterfold.moe.experts.Experts"},
    "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
}
SIZES = {
    "dp2": {},
    "ep2": {"ep": 2},
    "tp2": {"tp": 2, "etp": 2},
    "tp2_etp1": {"tp": 2},
    "tp2_ep2": {"tp": 2, "ep": 2},
    "cp2_ep2": {"cp": 2, "ep": 2},
    "pp2": {"pp": 2},
    "pp2_interleaved": {"pp": 2, "virtual_stages": 2},
    "tp2_dp2_ep2_etp2": {"tp": 2, "ep": 2, "etp": 2},
    "pp2_tp2_ep2": {"pp": 2, "tp": 2, "ep": 2},
}
# How losses are scaled: as our engines do, or as Megatron does, per token or as means of micro-batches.
CASES = {
    **{(name, "ours"): 4 if name in ("tp2_dp2_ep2_etp2", "pp2_tp2_ep2") else 2 for name in SIZES},
    ("tp2_ep2", "per_token"): 2,
    ("dp2", "per_token"): 2,
    ("tp2_ep2", "mean"): 2,
    ("cp2_ep2", "mean"): 2,
    ("pp2", "mean"): 2,
    ("ep2", "recomputed"): 2,
}
WEIGHTS_SEED = 5


def make_plan():
    return ModelPlan.from_config(CONFIG)


def micro_batch(number):
    """The same for every layout: two sequences, of several documents each."""
    generator = torch.Generator().manual_seed(number)
    tokens, labels = torch.randint(0, 32, (2, ROWS, LENGTH), generator=generator)
    cu_seqlens = torch.tensor([0, 3 + number, LENGTH, LENGTH + 7, 2 * LENGTH], dtype=torch.int32)
    return tokens, labels, cu_seqlens


@torch.no_grad()
def change_router_state(layers):
    """Values that training would have left there, so that the losses and choices that read them are seen."""
    for number, router in ((number, layer.router) for number, layer in layers):
        router.expert_bias.copy_(torch.tensor([0.01, -0.01, 0.0, 0.005]) * (number + 1))
        router.losses["balance_global_batch"].load.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))


class Records:
    """Stands in for `RouterStatistics`."""

    def __init__(self):
        self.counts = {}

    def record(self, index, routed, tokens):
        self.counts[index] = self.counts.get(index, 0) + routed.counts


def groups(world, tp=1, cp=1, pp=1, ep=1, etp=1, virtual_stages=None):
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual_stages,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    return ResolvedLayout(dp_replicate=world // (tp * cp * pp), tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)


def build(layout, virtual_stages=None, seed=WEIGHTS_SEED, **options):
    """This rank's stages, and Megatron's config."""
    from megatron.core import parallel_state

    from scatterfold.moe.megatron import build_gpt_model, transformer_config

    plan = make_plan()
    config = transformer_config(plan, layout=layout, virtual_stages=virtual_stages, **options)
    models = []
    for stage in range(virtual_stages or 1):
        vp_stage = None if virtual_stages is None else stage
        ends = {
            "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        }
        models.append(build_gpt_model(plan, config, vp_stage=vp_stage, seed=seed, **ends))
    for model in models:
        change_router_state(model.moe_layers())
    return models, config


def train_step(layout, mode, virtual_stages=None):
    """One step by Megatron's own schedule, data parallelism and finalize_model_grads; loss, gradients, counts."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from scatterfold.moe.megatron import to_ours

    options = {"calculate_per_token_loss": mode != "mean"}
    if mode == "recomputed":
        options["checkpointing"] = "full"
    models, config = build(layout, virtual_stages, **options)
    scale, records = 1 / (PASSES * ROWS * LENGTH), Records()
    sums_only = mode in ("ours", "recomputed")
    if sums_only:
        for model in models:
            model.begin_step(StepContext(global_tokens=PASSES * ROWS * LENGTH, statistics=records))
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(), model) for model in models]
    if sums_only:
        config.finalize_model_grads_func = lambda model, _, **others: finalize_model_grads(model, None, **others)
    else:
        config.finalize_model_grads_func = finalize_model_grads
    losses = []

    def loss_of(out):
        losses.append(out.detach().double().sum() * scale)
        if sums_only:
            return out.sum() * scale, torch.tensor(1, dtype=torch.int), {}
        return out.sum(), torch.tensor(out.numel(), dtype=torch.int), {}

    def forward(batches, model):
        tokens, labels, cu_seqlens = next(batches)
        own = [own_part(part, 1, layout.cp, parallel_state.get_context_parallel_rank()) for part in (tokens, labels)]
        return model(own[0], None, None, labels=own[1], cu_seqlens=cu_seqlens), loss_of

    each = PASSES // layout.data
    first = parallel_state.get_data_parallel_rank() * each
    batches = [iter([micro_batch(first + number) for number in range(each)]) for _ in models]
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=batches if virtual_stages else batches[0],
        model=wrapped if virtual_stages else wrapped[0],
        num_microbatches=each,
        seq_length=LENGTH,
        micro_batch_size=ROWS,
        forward_only=False,
    )
    gradients = {}
    for model in models:
        gradients |= to_ours(model, lambda parameter: parameter.main_grad)
    loss = sum(losses, torch.zeros((), dtype=torch.float64)) / layout.tp
    return {"loss": loss, "gradients": gradients, "counts": records.counts}


def checkpoints(world, folder, modes=("ep2", "dp2", "tp2", "pp2")):
    """Saved at ep = 2; loaded by every layout into other values, and saved once more by tp = 2."""
    from megatron.core import dist_checkpointing

    from scatterfold.moe.megatron import to_ours

    found = {}
    for name in modes:
        models, _ = build(groups(world, **SIZES[name]), seed=WEIGHTS_SEED if name == "ep2" else 9)
        (model,) = models
        path = folder / "checkpoint"
        if name == "ep2":
            if dist.get_rank() == 0:
                path.mkdir()
            dist.barrier()
            dist_checkpointing.save(model.sharded_state_dict(), str(path))
        else:
            for _, layer in model.moe_layers():
                layer.router.expert_bias.zero_()
            state = dist_checkpointing.load(model.sharded_state_dict(), str(path))
            model.load_state_dict(state)
        found[name] = to_ours(model)
    return found


def live(rank, world, store, folder):
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)
    torch.set_num_threads(1)
    for (name, mode), ranks in CASES.items():
        if ranks == world:
            out = folder / f"{name}-{mode}"
            out.mkdir(exist_ok=True)
            sizes = dict(SIZES[name])
            virtual = sizes.get("virtual_stages")
            torch.save(train_step(groups(world, **sizes), mode, virtual), out / f"{rank}.pt")
    if world == 2:
        torch.save(checkpoints(world, folder), folder / f"checkpoints-{rank}.pt")
        beside = _load(TESTS / "distributed/megatron_own_layer.py")
        compared = beside.compare(CONFIG, groups(world, ep=2), _load(NEAR))
        torch.save(compared, folder / f"layers-{rank}.pt")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def on_cpu():
    """Let Megatron run here, for the rest of the process: its models, schedules, data parallelism and checkpoints."""
    _load(TESTS / "distributed/megatron_shim.py").install()
    _load(NEAR).patch_for_cpu(pytest.MonkeyPatch())
    from megatron.core.models.common.embeddings import rotary_pos_embedding

    def own_positions(positions, dim, group):  # theirs without pinned memory: chunks r and 2 CP - 1 - r
        chunks = positions.chunk(2 * group.size(), dim)
        return torch.cat((chunks[group.rank()], chunks[2 * group.size() - 1 - group.rank()]), dim)

    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = own_positions


def _load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder):
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    on_cpu()
    import scatterfold.moe.megatron.weights  # noqa: F401

    for world in (2, 4):
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    live(rank, world, folder / f"store{world}", folder)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
