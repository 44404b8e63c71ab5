"""A run to take models from: four steps of a small one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from scatterfold.moe.build import ModelPlan
from scatterfold.moe.interop import StoredModel
from scatterfold.moe.training.run import train
from scatterfold.parallel.checkpoint import read_shapes
from scatterfold.parallel.checkpoint.lazy import in_memory


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """Four steps of a model with a dense and a MoE layer, an expert bias and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        (folder / f"{number:02d}.txt").write_text(" ".join(f"word{(number * 7 + i * i) % 13}" for i in range(120)))
    return {
        "seed": 0,
        "model": {
            "layers": 2,
            "width": 16,
            "heads": 2,
            "ffn_width": 32,
            "expert_width": 16,
            "num_experts": 4,
            "first_k_dense": 1,
        },
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2, "bias_rate": 0.013},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
        "data": {
            "path": str(folder),
            "sequence_length": 32,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "cache_dir": str(folder.parent / "cache"),
            "workers": 1,
            "tokenizer": str(write_tokenizer(folder.parent / "tokenizer")),
        },
        "optimizer": {"_target_": "scatterfold.moe.training.AdamW", "lr": 3e-3},
        "schedule": {"_target_": "scatterfold.moe.training.Cosine", "warmup_steps": 1},
        "trainer": {"steps": 4, "checkpoint_every": 2, "eval_every": 0, "report": False, "device": "cpu"},
        "logger": {"display": "none"},
        "layout": {},
        "engine": {"_target_": "scatterfold.parallel.engines.TorchEngine"},
    }


def write_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["word1 word2 word12"] * 5,
        trainers.BpeTrainer(
            vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="session")
def run(config, tmp_path_factory):
    """A run folder; do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config, folder)
    return folder


def read_with_torch(checkpoint, kind="model."):
    """The tensors of one kind in a checkpoint, read by torch.distributed.checkpoint alone."""
    shapes = {name: shape for name, shape in read_shapes(checkpoint).items() if name.startswith(kind)}
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    dcp_load(state, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix(kind): tensor for name, tensor in state.items()}


@pytest.fixture(scope="session")
def mixture():
    """A model in memory that every format can hold: Mixtral's."""
    config = {
        "model": {
            "vocab_size": 61,
            "layers": 2,
            "width": 16,
            "heads": 4,
            "kv_heads": 2,
            "head_width": 4,
            "expert_width": 12,
            "num_experts": 4,
            "max_positions": 64,
        },
        "router": {"_target_": "scatterfold.moe.routers.TopKRouter", "top_k": 2, "renormalise": True},
        "experts": {"_target_": "scatterfold.moe.Experts"},
        "dispatcher": {"_target_": "scatterfold.parallel.dispatchers.LocalDispatcher"},
    }
    model = ModelPlan.from_config(config).make_model()
    model.reset_parameters(3)
    tensors = {name: in_memory(tensor.detach()) for name, tensor in model.state_dict().items()}
    return StoredModel(Path("memory"), "checkpoint", config, tensors, step=7)


@pytest.fixture(scope="session")
def in_checkpoint():
    """`in_checkpoint(folder, kind) -> tensors by name`, by torch's own reader."""
    return read_with_torch


@pytest.fixture(scope="session")
def in_files():
    """`in_files(folder) -> tensors by name` of all its safetensors files, by the library's own reader."""

    def read(folder, pattern="model*.safetensors"):
        return {name: tensor for file in sorted(folder.glob(pattern)) for name, tensor in load_file(file).items()}

    return read


@pytest.fixture(scope="session")
def same_bits():
    """Raise unless two mappings hold the same tensors, dtypes included."""

    def check(one, other):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name

    return check


@pytest.fixture
def untouched(run):
    """Fails the test if it has changed a byte or a time of the run's folder."""

    def state():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}

    before = state()
    yield
    assert state() == before
