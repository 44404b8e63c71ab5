"""Megatron-Core's own GPTModel and dist_checkpointing, on a CPU and in this process.

It asks for CUDA in a handful of places that compute nothing, writes checkpoints from processes of its own, and its MoE
layer names a function of Transformer Engine. What is compared is its own code all the same: the model classes, their
sharded state dict, and dist_checkpointing.
"""

import contextlib
import copy
import dataclasses
import queue
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

BASE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "activation_func": "silu",
    "gated_linear_unit": True,
    "vocab_size": 61,
    "max_sequence_length": 32,
    "position_embedding_type": "rope",
}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}


class InlineProcess:
    def __init__(self, target, kwargs):
        self.run = lambda: target(**kwargs)

    def start(self):
        self.run()

    def join(self):
        pass


class Stream:
    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other):
        pass


def patch_for_cpu(patch):
    """Through a pytest `MonkeyPatch`."""
    cpu = torch.device("cpu")
    for name, value in {
        "current_device": lambda: cpu,
        "synchronize": lambda *_: None,
        "current_stream": lambda *_: None,
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": Stream,
    }.items():
        patch.setattr(torch.cuda, name, value)
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import moe_utils

    context = SimpleNamespace(Queue=queue.Queue, JoinableQueue=queue.Queue, Process=InlineProcess)
    context.Manager = lambda: context
    kinds = {"Queue": queue.Queue, "SimpleQueue": queue.Queue, "JoinableQueue": queue.Queue}
    patch.setattr(filesystem_async, "mp", SimpleNamespace(get_context=lambda _: context, **kinds))
    patch.setattr(filesystem_async, "_process_memory", lambda: 0)  # would ask for psutil
    patch.setattr(filesystem_async, "_results_queue", None)
    patch.setattr(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    patch.setattr(moe_utils, "te_general_gemm", None, raising=False)

    def window_mask(queries, keys, window):  # theirs with device="cuda" left out
        ones = torch.ones(queries, keys, dtype=torch.bool)
        return ~ones.triu(keys - queries - window[0]).tril(keys - queries + window[1])

    patch.setattr(fused_softmax, "get_sliding_window_causal_mask", window_mask)


def transformer_config(fields, **others):
    from megatron.core.activations import quick_gelu, squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    functions = {"quick_gelu": quick_gelu, "squared_relu": squared_relu}
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    given = {name: copy.deepcopy(value) for name, value in fields.items() if name in known}
    name = given.pop("activation_func", "gelu")
    if given.get("window_size"):
        given["window_size"] = tuple(given["window_size"])
    if given.get("moe_grouped_gemm"):
        given["moe_grouped_gemm"] = False  # the grouped experts need Transformer Engine; their keys are the same
    return TransformerConfig(
        **given,
        **others,
        activation_func=functions.get(name) or getattr(torch.nn.functional, name),
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
    )


class Megatron:
    """What a test does with it, inside of `megatron` or a rank."""

    def build(self, fields, seed=0, **others):
        """A GPTModel with random values everywhere; `fields` as in transformer_config.json."""
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from megatron.core.models.gpt.gpt_model import GPTModel

        torch.manual_seed(seed)
        config = transformer_config(fields, **others)
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
        named = ("vocab_size", "max_sequence_length", "position_embedding_type", "rotary_base", "rotary_percent")
        scaled = ("rope_scaling", "rope_scaling_factor", "seq_len_interpolation_factor")
        tied = "share_embeddings_and_output_weights"
        model = GPTModel(config, spec, **{name: fields[name] for name in (*named, *scaled, tied) if name in fields})
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if "inv_freq" not in name:
                    tensor.normal_(std=0.3)
                    if "layernorm" in name:
                        tensor.add_(1.0)
        return model.eval()

    def save(self, model, folder, metadata=None, **common):
        from megatron.core import dist_checkpointing

        folder.mkdir(parents=True, exist_ok=True)
        state = model.sharded_state_dict(metadata=metadata)
        dist_checkpointing.save({**state, **common}, str(folder), content_metadata=metadata)
        return folder

    def load(self, model, folder, **options):
        """As Megatron-LM does: with the metadata that the checkpoint itself names, and its arguments allowed."""
        from megatron.core import dist_checkpointing
        from megatron.core.safe_globals import SAFE_GLOBALS

        with torch.serialization.safe_globals(SAFE_GLOBALS):
            metadata = dist_checkpointing.load_content_metadata(str(folder))
            state = dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), str(folder), **options)
        names = model.state_dict().keys()
        model.load_state_dict({name: value for name, value in state.items() if name in names})
        return model

    @torch.no_grad()
    def logits(self, model, tokens):
        length = tokens.shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        return model(tokens, torch.arange(length).expand_as(tokens), mask)


@contextlib.contextmanager
def ranks(store, rank, world, **layout):
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(**layout)
    try:
        yield Megatron()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.fixture
def for_cpu(monkeypatch):
    pytest.importorskip("megatron.core")
    patch_for_cpu(monkeypatch)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def megatron(for_cpu):
    """Megatron-Core, initialised for one process."""
    with ranks(dist.HashStore(), 0, 1) as core:
        yield core


@pytest.fixture
def base():
    return BASE


@pytest.fixture
def moe_base():
    return {**BASE, **MOE}
