"""Our MoE layer on Megatron's groups of two ranks beside Megatron's own MoE layer."""

from dataclasses import replace

import torch
import torch.distributed as dist

from scatterfold.moe.build import ModelPlan


def compare(config, layout, tools):
    """Ours by both dispatchers, and Megatron's own MoE layer by its all-gather, at ep = 2 with the same weights.

    Returns by dispatcher what must be equal: (ours, theirs) by name.
    """
    from scatterfold.moe.interop.megatron.groups import write_fields
    from scatterfold.moe.megatron import MegatronMoELayer, transformer_config

    router = {"_target_": config["router"]["_target_"], "top_k": 2, "balance_sequence": 0.3, "z_loss": 0.1}
    shape = {**config["model"], "shared_expert_width": None, "shared_expert_gate": False}
    plan = ModelPlan.from_config({**config, "model": shape, "router": router})
    theirs = make_theirs(tools.transformer_config(write_fields(plan), expert_model_parallel_size=layout.ep))
    found = {}
    for dispatcher in ("AllToAllDispatcher", "AllGatherDispatcher"):
        plan = replace(plan, dispatcher={"_target_": f"scatterfold.parallel.dispatchers.{dispatcher}"})
        settings = transformer_config(plan, layout=layout, calculate_per_token_loss=False)
        ours = MegatronMoELayer(settings, plan=plan, layer=1)
        fill(ours, 4)
        for mine, yours in pairs(ours, theirs):
            yours.data.copy_(mine.data)
        (out, into), (out_theirs, into_theirs) = step(ours), step(theirs)
        found[dispatcher] = {"output": (out, out_theirs), "input": (into, into_theirs)}
        for number, (mine, yours) in enumerate(pairs(ours, theirs, lambda parameter: parameter.grad)):
            found[dispatcher][f"weight {number}"] = (mine, yours.reshape(mine.shape).clone())
    return found


def make_theirs(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer

    layer = MoELayer(config, get_gpt_layer_local_spec(num_experts=config.num_moe_experts).submodules.mlp.submodules)
    layer.set_layer_number(2)
    return layer


@torch.no_grad()
def fill(layer, experts):
    """Every expert with values of its own, the same whichever rank holds it."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in layer.named_parameters():
        is_stack = name.startswith("experts.")
        values = torch.randn((experts, *parameter.shape[1:]) if is_stack else parameter.shape, generator=generator) / 2
        parameter.copy_(values.chunk(2)[dist.get_rank()] if is_stack else values)


def step(layer):
    """Output and gradient of the input, for tokens that each rank has for itself."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    layer.zero_grad()
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor([0.7])
    hidden, wanted = torch.randn(2, 10, 3, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
    hidden.requires_grad_()
    out, _ = layer(hidden)
    (out * wanted).sum().backward()
    return out.detach(), hidden.grad


def pairs(ours, theirs, of=lambda parameter: parameter):
    yield of(ours.router.weight), of(theirs.router.weight)
    for number, expert in enumerate(theirs.experts.local_experts):
        yield of(ours.experts.w_in)[number].flatten(0, 1), of(expert.linear_fc1.weight)
        yield of(ours.experts.w_out)[number], of(expert.linear_fc2.weight)
