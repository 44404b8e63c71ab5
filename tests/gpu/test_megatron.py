"""Our MoE layers inside Megatron-Core's GPTModel on a CUDA device, nothing of Megatron changed; on one rank."""

import copy

import pytest
import torch
import torch.distributed as dist

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.context import StepContext
from scatterfold.parallel.layout import ResolvedLayout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
pytest.importorskip("megatron.core")

ROWS, LENGTH = 2, 128
CONFIG = {
    "model": {
        "vocab_size": 256,
        "layers": 3,
        "width": 128,
        "heads": 4,
        "kv_heads": 2,
        "ffn_width": 256,
        "expert_width": 64,
        "num_experts": 8,
        "first_k_dense": 1,
        "shared_expert_width": 64,
        "qk_norm": "head",
        "max_positions": LENGTH,
    },
    "router": {
        "_target_": "scatterfold.moe.routers.TopKRouter",
        "top_k": 2,
        "score": "sigmoid",
        "bias_rate": 0.001,
        "balance_sequence": 0.01,
        "z_loss": 0.001,
    },
    "experts": {"_target_": "scatterfold.moe.experts.Experts"},
    "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.AllToAllDispatcher"},
}


@pytest.fixture(scope="module", autouse=True)
def groups(tmp_path_factory):
    from megatron.core import parallel_state

    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path_factory.mktemp("ranks") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture
def plan():
    return ModelPlan.from_config(CONFIG)


def build(plan, precision="fp32", seed=0, **options):
    """In Megatron's DDP, and the config."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from scatterfold.moe.megatron import build_gpt_model, transformer_config

    config = transformer_config(plan, layout=ResolvedLayout(), precision=precision, **options)
    model = build_gpt_model(plan, config, seed=seed)
    wrapped = Float16Module(config, model) if precision == "bf16" else model
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, settings, wrapped), model, config


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (ROWS, LENGTH), generator=generator)
    cu_seqlens = torch.tensor([0, 50, LENGTH, LENGTH + 100, 2 * LENGTH], dtype=torch.int32)
    return tokens.cuda(), tokens.roll(-1, 1).cuda(), cu_seqlens


def reference(plan, seed=0):
    """Our own model on the same device."""
    with torch.device("cuda"):
        model = plan.make_model()
    model.reset_parameters(seed)
    return model


def step(wrapped, model, config, micro_batches):
    """Forward and backward by Megatron's schedule; the loss, whose gradients are summed."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens = len(micro_batches) * ROWS * LENGTH
    model.begin_step(StepContext(global_tokens=tokens))
    config.finalize_model_grads_func = lambda chunks, _, **others: finalize_model_grads(chunks, None, **others)
    losses = []

    def loss_of(out):
        losses.append(out.detach().float().sum() / tokens)
        return out.float().sum() / tokens, torch.tensor(1, dtype=torch.int, device="cuda"), {}

    def forward(batches, chunk):
        inputs, labels, cu_seqlens = next(batches)
        return chunk(inputs, None, None, labels=labels, cu_seqlens=cu_seqlens), loss_of

    wrapped.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(micro_batches),
        model=wrapped,
        num_microbatches=len(micro_batches),
        seq_length=LENGTH,
        micro_batch_size=ROWS,
        forward_only=False,
    )
    return float(sum(losses))


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_loss_and_gradients_are_those_of_our_own_model(plan, checkpointing):
    from scatterfold.moe.megatron import to_ours

    wrapped, model, config = build(plan, checkpointing=checkpointing)
    loss = step(wrapped, model, config, [batch(0), batch(1)])
    ours, expected = reference(plan), 0.0
    for seed in range(2):
        tokens, labels, cu_seqlens = batch(seed)
        context = StepContext(global_tokens=2 * ROWS * LENGTH)
        part = ours(tokens, labels, cu_seqlens, context) / (2 * ROWS * LENGTH)
        part.backward()
        expected += float(part.detach())
    assert loss == pytest.approx(expected, rel=1e-4)
    found = to_ours(model, lambda parameter: parameter.main_grad)
    for name, parameter in ours.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 1e-3 * parameter.grad.norm(), name


def test_initial_values_are_those_of_our_own_model(plan):
    from scatterfold.moe.megatron import to_ours

    _, model, _ = build(plan, seed=3)
    found, wanted = to_ours(model), reference(plan, seed=3).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_bf16_learns_with_megatrons_distributed_optimizer(plan):
    """The router stays in float32; a batch that is seen again and again is learnt."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped, model, config = build(plan, "bf16")
    _, layer = model.moe_layers()[0]
    assert layer.router.weight.dtype == layer.router.expert_bias.dtype == torch.float32
    assert layer.experts.w_in.dtype == torch.bfloat16
    settings = OptimizerConfig(
        optimizer="adam",
        lr=3e-3,
        weight_decay=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
        clip_grad=1.0,
    )
    optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(step(wrapped, model, config, [batch()]))
        took, norm, _ = optimizer.step()
        assert took and norm > 0
    tokens, labels, cu_seqlens = batch()
    first = float(reference(plan)(tokens, labels, cu_seqlens).detach()) / (ROWS * LENGTH)
    assert losses[0] == pytest.approx(first, rel=1e-2)
    assert losses[-1] < 0.7 * losses[0]


def test_a_distributed_checkpoint_is_read_back_and_by_us(plan, tmp_path):
    pytest.importorskip("psutil")  # dist_checkpointing.save of 0.16.1 waits for ever without it
    import yaml
    from megatron.core import dist_checkpointing

    from scatterfold.moe.interop.megatron import open_megatron
    from scatterfold.moe.megatron import to_ours

    _, model, _ = build(plan, seed=1)
    (tmp_path / "saved").mkdir()
    dist_checkpointing.save(model.sharded_state_dict(), str(tmp_path / "saved"))
    wanted = copy.deepcopy(to_ours(model))
    _, other, _ = build(plan, seed=2)
    other.load_state_dict(dist_checkpointing.load(other.sharded_state_dict(), str(tmp_path / "saved")))
    assert all(torch.equal(values, wanted[name]) for name, values in to_ours(other).items())
    described = tmp_path / "model.yaml"
    described.write_text(yaml.safe_dump({name: CONFIG[name] for name in ("model", "router", "experts")}))
    for name, tensor in open_megatron(tmp_path / "saved", described).checked().tensors.items():
        assert torch.equal(tensor.read(), wanted[name].cpu()), name
