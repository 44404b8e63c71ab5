"""The torch engine on one process, against plain torch written out."""

import math

import pytest
import torch
from torch import nn

from scatterfold.kernels import ConfigError, Routing, moe_mlp
from scatterfold.parallel import Process
from scatterfold.parallel.engines import TorchEngine
from scatterfold.parallel.plan import ShardingPlan


class Layer(nn.Module):
    """A MoE layer with a bias, routing each token to its best of three experts."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"gate": (3, 8), "w_in": (3, 8, 8), "w_out": (3, 8, 4)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            weight, expert = (x.float() @ self.gate.T).softmax(-1).max(-1, keepdim=True)
            routing = Routing.from_topk(expert, weight, 3)
        return x + moe_mlp(x, self.w_in, self.w_out, routing)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Layer(), Layer())

    def forward(self, x):
        return self.layers(x).float().square().sum()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def prepare(engine=None, **options):
    model = Model()
    plan = ShardingPlan(units=list(model.layers))
    return (engine or TorchEngine()).prepare(model, sgd, process=Process(), plan=plan, **options)


def inputs():
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))


def accumulate(engine, batches, scale=1.0):
    return engine.run([{"x": batch} for batch in batches], scale)


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def test_one_step_is_plain_torch():
    engine, model = prepare(), Model()
    optimizer = sgd(model)
    accumulate(engine, inputs())
    for batch in inputs():
        model(batch).backward()
    torch.testing.assert_close(gradients(engine.parts[0]), gradients(model), rtol=0, atol=0)
    expected = torch.stack([p.grad.double().norm() for p in model.parameters()])
    assert engine.grad_norms_by_parameter() == pytest.approx(
        dict(zip(dict(model.named_parameters()), expected.tolist()))
    )
    assert float(engine.clip(None)) == pytest.approx(float(expected.norm()), rel=1e-6)
    torch.testing.assert_close(gradients(engine.parts[0]), gradients(model), rtol=0, atol=0)
    assert float(engine.clip(0.5)) == pytest.approx(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)), rel=1e-6)
    torch.testing.assert_close(gradients(engine.parts[0]), gradients(model))
    assert float(engine.clip(0.6)) == pytest.approx(0.5, rel=1e-5)
    engine.step(), optimizer.step()
    torch.testing.assert_close(engine.parts[0].state_dict(), model.state_dict())
    engine.zero_grad()
    assert all(parameter.grad is None for parameter in engine.parts[0].parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_nowhere_else(value):
    engine = prepare()
    accumulate(engine, inputs())
    engine.parts[0].layers[1].w_in.grad[1, 0, 0] = value
    assert not torch.isfinite(engine.clip(1.0))
    norms = engine.grad_norms_by_parameter()  # clipping has left the others alone, so the culprit can be named
    assert [name for name, norm in norms.items() if not math.isfinite(norm)] == ["layers.1.w_in"]


def test_norm_without_gradients_is_zero():
    engine = prepare()
    assert float(engine.clip(1.0)) == 0.0
    assert engine.grad_norms_by_parameter() == {}


def test_bf16_is_autocast_over_float32_parameters():
    engine, model = prepare(precision="bf16"), Model()
    accumulate(engine, inputs())
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(batch) for batch in inputs()]
    sum(losses).backward()
    assert {p.dtype for p in engine.parts[0].parameters()} == {torch.float32}
    torch.testing.assert_close(gradients(engine.parts[0]), gradients(model))
    assert engine.evaluate({"x": inputs()[0]}) == losses[0]
    assert prepare().evaluate({"x": inputs()[0]}) != losses[0]


def test_compiled_equals_eager():
    compiled, eager = prepare(TorchEngine(compile_backend="aot_eager"), compile=True), prepare()
    for engine in (compiled, eager):
        accumulate(engine, inputs())
    torch.testing.assert_close(gradients(compiled.parts[0]), gradients(eager.parts[0]))
    assert compiled.state_dict().keys() == eager.state_dict().keys()


def test_deterministic_mode_is_torchs():
    before = torch.are_deterministic_algorithms_enabled()
    try:
        prepare(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_model_on_the_meta_device_is_created_from_the_seed():
    class Fresh(nn.Linear):
        def reset_parameters(self, seed=0):
            with torch.no_grad():
                self.weight.fill_(seed)
                self.bias.fill_(-seed)

    engine = TorchEngine().prepare(Fresh(2, 2, device="meta"), sgd, process=Process(), seed=7)
    assert engine.parts[0].weight.device.type == "cpu"
    assert engine.parts[0].weight.eq(7).all() and engine.parts[0].bias.eq(-7).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TorchEngine(bucket_mb=0), "engine.bucket_mb=0 is out of range, allowed: above 0"),
        (lambda: prepare(precision="fp8"), "trainer.precision='fp8' is unknown, allowed: fp32, bf16"),
        (
            lambda: TorchEngine(pipeline_schedule="2f2b"),
            "engine.pipeline_schedule='2f2b' is unknown, allowed: 1f1b, gpipe, interleaved, zero_bubble, zero_bubble_v",
        ),
        (
            lambda: prepare(TorchEngine(compile_backend="gcc"), compile=True),
            "engine.compile_backend='gcc' is unknown, allowed: aot_eager, .*inductor",
        ),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
