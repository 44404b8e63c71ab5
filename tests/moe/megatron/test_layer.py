"""Our MoE layer on Megatron's groups against Megatron's own MoE layer, with the same weights."""

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.parallel.layout import ResolvedLayout

CASES = {
    "softmax after top-k": ({}, {"score": "softmax_after", "renormalise": False}, {}),
    "softmax before top-k": ({}, {"renormalise": False, "top_k": 3}, {}),
    "one expert": ({}, {"renormalise": False, "top_k": 1}, {}),
    "all losses": (
        {},
        {"balance_micro_batch": 0.3, "balance_sequence": 0.2, "z_loss": 0.1},
        {},
    ),
    "deepseek": (
        {"shared_expert_width": 6, "shared_expert_gate": True},
        {
            "score": "sigmoid",
            "bias_rate": 0.01,
            "top_k": 4,
            "scale": 2.5,
            "num_groups": 4,
            "top_groups": 2,
            "group_score": "top2_sum",
        },
        {},
    ),
    "without gates": ({"activation": "relu2"}, {"balance_sequence": 0.2}, {"activation": "relu2"}),
    "with biases": (
        {"moe_layers": None, "attention_bias": True, "attention_output_bias": True},
        {"score": "softmax_after", "renormalise": False, "gate_bias": True},
        {"bias": True},
    ),
}


@pytest.fixture(params=CASES)
def case(request, megatron, plan_of):
    """Our layer, and Megatron's with the same weights."""
    return both(plan_of(*CASES[request.param]), request.getfixturevalue("tools"))


def make(plan, **options):
    from scatterfold.moe.megatron import MegatronMoELayer, transformer_config

    config = transformer_config(plan, layout=ResolvedLayout(), calculate_per_token_loss=False, **options)
    return MegatronMoELayer(config, plan=plan, layer=1)


def both(plan, tools):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from scatterfold.moe.interop.megatron.groups import write_fields

    fields = write_fields(plan)
    config = tools.transformer_config({**fields, "moe_grouped_gemm": False})
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts).submodules.mlp
    theirs = MoELayer(config, spec.submodules)
    theirs.set_layer_number(2)
    ours = make(plan)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in ours.parameters():
            tensor.normal_(0, 0.5, generator=generator)
        if ours.router.bias is not None:
            theirs.router.bias.copy_(ours.router.bias)
        if getattr(ours.router, "expert_bias", None) is not None:
            ours.router.expert_bias.normal_(0, 0.2, generator=generator)
            theirs.router.expert_bias.copy_(ours.router.expert_bias)
        for name, tensor in pairs(ours, theirs):
            tensor.copy_(name)
    return ours, theirs


def pairs(ours, theirs, of=lambda parameter: parameter):
    """Our values, and what must hold the same in their layer."""
    yield of(ours.router.weight), of(theirs.router.weight)
    for number, expert in enumerate(theirs.experts.local_experts):
        w_in = of(ours.experts.w_in)[number]
        yield w_in.flatten(0, -2), of(expert.linear_fc1.weight)
        yield of(ours.experts.w_out)[number], of(expert.linear_fc2.weight)
        if ours.experts.b_in is not None:
            yield of(ours.experts.b_in)[number].flatten(), of(expert.linear_fc1.bias)
            yield of(ours.experts.b_out)[number], of(expert.linear_fc2.bias)
    if ours.shared is not None:
        gate, up = of(ours.shared.w_gate.weight), of(ours.shared.w_up.weight)
        yield torch.cat((gate, up)), of(theirs.shared_experts.linear_fc1.weight)
        yield of(ours.shared.w_out.weight), of(theirs.shared_experts.linear_fc2.weight)
        yield of(ours.shared.gate.weight), of(theirs.shared_experts.gate_weight)


def test_outputs_and_gradients_are_those_of_megatrons_own_layer(case):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    ours, theirs = case
    if ours.experts.b_in is not None:  # theirs adds the bias in place to what autograd forbids to change
        hidden = torch.randn(12, 3, 16)
        with torch.no_grad():
            torch.testing.assert_close(ours(hidden)[0], theirs(hidden)[0], rtol=1e-4, atol=1e-5)
        return
    hidden, wanted = torch.randn(2, 12, 3, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for layer in (ours, theirs):
        MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor([0.7])  # as their schedules set it
        x = hidden.clone().requires_grad_()
        out, bias = layer(x)
        out = out if bias is None else out + bias
        (out * wanted).sum().backward()
        gradients.append((out.detach(), x.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    for ours_grad, their_grad in pairs(ours, theirs, lambda parameter: parameter.grad):
        torch.testing.assert_close(ours_grad.reshape(their_grad.shape), their_grad, rtol=1e-4, atol=1e-5)


def test_marks_say_who_sums_which_gradients(megatron, plan_of):
    layer = make(plan_of({"shared_expert_width": 6, "shared_expert_gate": True}))
    for name, parameter in layer.named_parameters():
        assert getattr(parameter, "allreduce", True) is not name.startswith("experts.")
        is_cut = name.startswith("experts.") or name.startswith("shared.w_")
        assert getattr(parameter, "tensor_model_parallel", False) is is_cut
        assert hasattr(parameter, "sequence_parallel") is not is_cut
    assert layer.experts.w_in.partition_dim == 2 and layer.shared.w_out.weight.partition_dim == 1


def test_a_cast_spares_the_router(megatron, plan_of):
    layer = make(plan_of(router={"score": "sigmoid", "bias_rate": 0.01}), precision="bf16")
    weight = layer.router.weight.detach().clone()
    layer = layer.bfloat16()
    assert layer.router.weight.dtype == layer.router.expert_bias.dtype == torch.float32
    assert torch.equal(layer.router.weight, weight)
    assert layer.experts.w_in.dtype == torch.bfloat16
    out, bias = layer(torch.randn(4, 2, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.shape == (4, 2, 16) and bias is None


def test_what_the_layer_refuses(megatron, plan_of):
    layer = make(plan_of())
    with pytest.raises(ConfigError, match="layer 3 was built as layer 2, counting from 1"):
        layer.set_layer_number(3)
    with pytest.raises(NotImplementedError, match="padding_mask"):
        layer(torch.randn(4, 2, 16), torch.ones(2, 4, dtype=torch.bool))


def test_recomputed_tokens_are_not_counted_twice(megatron, plan_of):
    from torch.utils.checkpoint import checkpoint

    from scatterfold.moe.context import StepContext

    class Statistics:
        calls = 0

        def record(self, *_):
            self.calls += 1

    layer = make(plan_of())
    layer.context = StepContext(statistics=Statistics())
    hidden = torch.randn(4, 2, 16, requires_grad=True)
    checkpoint(lambda x: layer(x)[0], hidden, use_reentrant=True).sum().backward()
    assert layer.context.statistics.calls == 1
