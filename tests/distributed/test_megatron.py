"""Our model in Megatron's GPTModel, with its schedules, data parallelism and checkpoints, against our own alone."""

import os
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from scatterfold.moe.context import StepContext

pytest.importorskip("megatron.core")
RANKS = Path(__file__).with_name("megatron_ranks.py")
spec = spec_from_file_location("megatron_ranks", RANKS)
ranks = module_from_spec(spec)
spec.loader.exec_module(ranks)
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(warm_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [warm_python, RANKS, folder], env=environment, timeout=540, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


@pytest.fixture(scope="module")
def model():
    model = ranks.make_plan().make_model()
    model.reset_parameters(ranks.WEIGHTS_SEED)
    ranks.change_router_state(model.moe_layers())
    return model


@pytest.fixture(scope="module")
def alone(model):
    """Loss, gradients and counts of the step by our own model, which knows nothing of Megatron."""
    total, records = ranks.PASSES * ranks.ROWS * ranks.LENGTH, ranks.Records()
    loss = 0.0
    for number in range(ranks.PASSES):
        tokens, labels, cu_seqlens = ranks.micro_batch(number)
        context = StepContext(global_tokens=total, statistics=records)
        part = model(tokens, labels, cu_seqlens, context) / total
        part.backward()
        loss += float(part.detach())
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return loss, gradients, records.counts


@pytest.mark.parametrize(("name", "mode"), list(ranks.CASES))
def test_a_step_is_that_of_our_own_model(found, alone, name, mode):
    loss, gradients, counts = alone
    parts = [torch.load(file) for file in sorted((found / f"{name}-{mode}").iterdir())]
    assert float(sum(part["loss"] for part in parts)) == pytest.approx(loss, rel=1e-6)
    seen = set()
    for part in parts:
        for parameter, gradient in part["gradients"].items():
            wanted = gradients[parameter]
            assert (gradient - wanted).norm() <= 2e-5 * wanted.norm(), parameter
        seen |= part["gradients"].keys()
    assert seen == gradients.keys()
    if mode in ("ours", "recomputed"):
        for layer, wanted in counts.items():
            assert torch.equal(sum(part["counts"].get(layer, 0) for part in parts), wanted)


@pytest.mark.parametrize("name", ["ep2", "dp2", "tp2", "pp2"])
def test_a_distributed_checkpoint_crosses_layouts_bit_equal(found, model, name):
    """Saved at ep = 2, loaded by each; our model without Megatron has the very same values under the same names."""
    wanted, seen = model.state_dict(), set()
    for rank in range(2):
        for tensor, values in torch.load(found / f"checkpoints-{rank}.pt")[name].items():
            assert torch.equal(values, wanted[tensor]), tensor
            seen.add(tensor)
    assert seen == wanted.keys()


@pytest.mark.parametrize("dispatcher", ["AllToAllDispatcher", "AllGatherDispatcher"])
def test_experts_on_two_ranks_are_those_of_megatrons_own_layer(found, dispatcher):
    for rank in range(2):
        for name, (ours, theirs) in torch.load(found / f"layers-{rank}.pt")[dispatcher].items():
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_our_reader_of_megatron_checkpoints_opens_it(found, model):
    import yaml

    from scatterfold.moe.interop.megatron import open_megatron

    described = found / "model.yaml"
    described.write_text(yaml.safe_dump({name: ranks.CONFIG[name] for name in ("model", "router", "experts")}))
    tensors = open_megatron(found / "checkpoint", described).checked().tensors
    for name, wanted in model.state_dict().items():
        if not name.endswith(".load"):  # what only training uses is not a part of the model there
            assert torch.equal(tensors[name].read(), wanted), name
