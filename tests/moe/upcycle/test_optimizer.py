"""AdamW's moments go with the weights: a step of the MoE against the same step of the dense model."""

from dataclasses import replace

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.moe.upcycle import UpcycleSettings, upcycle
from scatterfold.parallel.checkpoint import model_state, optimizer_state
from scatterfold.parallel.checkpoint.lazy import in_memory

LR = 1e-2


def module_of(stored):
    """The model in float64 and training mode, with an optimizer that has the stored state."""
    model = stored.plan().make_model().double().train()
    with torch.no_grad():
        for name, tensor in model_state(model).items():
            tensor.copy_(stored.tensors[name.removeprefix("model.")].read())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, eps=1e-14, weight_decay=0.0)
    for name, parameter in model.named_parameters():
        state = {
            key.removeprefix(f"{name}."): tensor.read().double()
            for key, tensor in stored.optimizer.items()
            if key.startswith(f"{name}.")
        }
        if state:
            optimizer.state[parameter] = state
    return model, optimizer


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(37, (2, 2, 24), generator=generator)
    (model(tokens, labels) / labels.numel()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def trained(make_dense):
    """A dense model after one step, with its optimizer's state."""
    dense = make_dense(qk_norm="head")
    model, optimizer = module_of(dense)
    step(model, optimizer, seed=1)
    tensors = {name.removeprefix("model."): in_memory(value.clone()) for name, value in model_state(model).items()}
    state = {
        name.removeprefix("optimizer."): in_memory(value.clone())
        for name, value in optimizer_state(optimizer, model).items()
    }
    return replace(dense, tensors=tensors, optimizer=state)


@pytest.mark.parametrize("scale", ["up_down", "down", "output", "cube_root"])
def test_the_second_step_is_that_of_the_dense_model(trained, scale):
    """One copy cut into four experts, all of which every token takes: the same function, with weights k times as large.

    AdamW's step does not depend on the size of gradients, so a weight k w moves as far as w did.
    """
    settings = UpcycleSettings(
        *(4, 4, "fine_grained"), granularity=4, optimizer="carry", scale=scale, balance_micro_batch=0.0, z_loss=0.0
    )
    if scale == "cube_root":  # the same function only where the activation lets the constant through
        trained = replace(
            trained, config={**trained.config, "model": {**trained.config["model"], "activation": "reglu"}}
        )
    made = upcycle([trained], settings)
    (dense, dense_optimizer), (moe, moe_optimizer) = module_of(trained), module_of(made)
    step(dense, dense_optimizer, seed=2)
    step(moe, moe_optimizer, seed=2)
    for layer in "01":
        old, new = dense.blocks[layer].mlp, moe.blocks[layer].mlp
        before = trained.tensors
        moved = {
            name: getattr(old, name).weight - before[f"blocks.{layer}.mlp.{name}.weight"].read()
            for name in ("w_gate", "w_up", "w_out")
        }
        w_in = new.experts.w_in - made.tensors[f"blocks.{layer}.mlp.experts.w_in"].read()
        w_out = new.experts.w_out - made.tensors[f"blocks.{layer}.mlp.experts.w_out"].read()
        assert moved["w_up"].abs().max() > LR / 2
        torch.testing.assert_close(w_in[:, 0].flatten(0, 1), moved["w_gate"], rtol=1e-4, atol=LR * 1e-4)
        torch.testing.assert_close(w_in[:, 1].flatten(0, 1), moved["w_up"], rtol=1e-4, atol=LR * 1e-4)
        torch.testing.assert_close(torch.cat(list(w_out), 1), moved["w_out"], rtol=1e-4, atol=LR * 1e-4)
    for name, parameter in dense.named_parameters():
        if ".mlp." not in name:
            torch.testing.assert_close(moe.get_parameter(name), parameter, rtol=1e-6, atol=LR * 1e-4)


def test_reset_would_be_another_step(trained):
    """So the test above sees whether moments are carried."""
    made = replace(upcycle([trained], UpcycleSettings(4, 4, "fine_grained", granularity=4)), optimizer={})
    (dense, dense_optimizer), (moe, moe_optimizer) = module_of(trained), module_of(made)
    step(dense, dense_optimizer, seed=2)
    step(moe, moe_optimizer, seed=2)
    difference = (moe.embedding.weight - dense.embedding.weight).abs().max()
    assert difference > LR / 10


def test_every_trained_parameter_has_its_state_and_new_ones_begin_at_zero(trained):
    for method in ({}, {"method": "shared", "shared_gate": True}, {"method": "adapter"}, {"method": "noise"}):
        made = upcycle([trained], UpcycleSettings(optimizer="carry", **method))
        model, optimizer = module_of(made)
        wanted = optimizer_state(optimizer, model)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        keys = {f"{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")}
        assert made.optimizer.keys() == keys and len(wanted) == len(keys)
        for name in names:
            assert made.optimizer[f"{name}.exp_avg"].shape == model.get_parameter(name).shape
        router = {key: made.optimizer[f"blocks.0.mlp.router.weight.{key}"].read() for key in ("exp_avg", "step")}
        assert not router["exp_avg"].any() and router["step"] == 0
        assert made.optimizer["blocks.0.attention.wq.weight.step"].read() == 1
    assert not made.tensors["blocks.0.mlp.experts.w_in"].read().isnan().any()


def test_what_was_frozen_is_trained_and_begins_at_zero(trained):
    frozen = ("embedding.weight", "blocks.0.mlp.w_gate.weight", "blocks.0.mlp.w_up.weight", "blocks.0.mlp.w_out.weight")
    state = {name: tensor for name, tensor in trained.optimizer.items() if name.rpartition(".")[0] not in frozen}
    config = {**trained.config, "model": {**trained.config["model"], "frozen": ["embedding.*", "blocks.0.mlp.*"]}}
    made = upcycle([replace(trained, config=config, optimizer=state)], UpcycleSettings(optimizer="carry"))
    assert not made.plan().config.frozen
    for name in ("embedding.weight", "blocks.0.mlp.experts.w_in"):
        assert not made.optimizer[f"{name}.exp_avg_sq"].read().any() and made.optimizer[f"{name}.step"].read() == 0
    assert made.optimizer["blocks.1.mlp.experts.w_in.step"].read() == 1


def test_moments_have_the_size_of_their_weights(trained):
    made = upcycle([trained], UpcycleSettings(8, 4, "fine_grained", granularity=4, optimizer="carry", scale="down"))
    for key, factor in (("exp_avg", 1 / 4), ("exp_avg_sq", 1 / 16)):
        source = trained.optimizer[f"blocks.0.mlp.w_out.weight.{key}"].read()
        carried = made.optimizer[f"blocks.0.mlp.experts.w_out.{key}"].read()
        torch.testing.assert_close(torch.cat(list(carried[:4]), 1), source * factor)
        torch.testing.assert_close(torch.cat(list(carried[4:]), 1), source * factor)


def test_what_cannot_be_carried_is_refused(trained, make_dense):
    def refuse(message, source=trained, **settings):
        with pytest.raises(ConfigError, match=message):
            upcycle([source], UpcycleSettings(optimizer="carry", **settings))

    refuse("optimizer=carry, but dense-0 holds no optimizer state, allowed: reset", make_dense())
    refuse("optimizer=carry does not fit method=drop", method="drop")
    muon = {name.replace("exp_avg_sq", "momentum_buffer"): tensor for name, tensor in trained.optimizer.items()}
    refuse("optimizer state has momentum_buffer, allowed: AdamW's", replace(trained, optimizer=muon))
    with pytest.raises(ConfigError, match="does not fit method=branch_train_mix"):
        upcycle([trained] * 2, UpcycleSettings(optimizer="carry", method="branch_train_mix"))
