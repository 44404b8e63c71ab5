"""Models of transformers on Scatterfold's kernels, against transformers' own two ways of running experts."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

from scatterfold.kernels import ConfigError
from scatterfold.moe.interop import transformers as plugin

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
FINE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
SHARED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
GROUPS = {"n_group": 2, "topk_group": 1}
MODELS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**FINE, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**FINE, "head_dim": 8},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {**LATENT, **SHARED, **GROUPS, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**LATENT, **SHARED, **GROUPS},
    "glm4_moe": {**SHARED, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    assert plugin.register() == plugin.register() == "scatterfold"


def tiny(model_type: str, dtype: torch.dtype = torch.float32, **changed):
    """A random model, its initial values wide enough for every expert to matter, and a batch of tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **MODELS[model_type], **changed})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or not parameter.any():  # a bias of zero would hide its omission
                parameter.normal_(std=0.2)
    return model, torch.randint(0, 97, (2, 20))


def results(model, tokens, implementation: str, training: bool = True) -> dict[str, torch.Tensor]:
    """Logits and all gradients of one step."""
    model.set_experts_implementation(implementation)
    model.train(training).zero_grad()
    out = model(tokens, labels=tokens)
    out.loss.backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_and_all_gradients_are_those_of_transformers(model_type):
    model, tokens = tiny(model_type)
    ours = results(model, tokens, "scatterfold")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(ours) - {"logits"}
    assert all(grad.any() for name, grad in ours.items() if "experts" in name)
    for other in ("grouped_mm", "eager"):
        for name, wanted in results(model, tokens, other).items():
            scale = wanted.abs().max().item()
            torch.testing.assert_close(ours[name], wanted, rtol=0, atol=2e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("model_type", MODELS)
def test_the_kernels_run_at_all(model_type, monkeypatch):
    """Every model above would pass too if its implementation were quietly another one."""
    model, tokens = tiny(model_type)
    calls = []
    for name in ("moe_mlp", "scatter2scatter"):
        real = getattr(plugin, name)
        monkeypatch.setattr(plugin, name, lambda *a, _r=real, _n=name, **k: calls.append(_n) or _r(*a, **k))
    model.set_experts_implementation("scatterfold")
    with torch.no_grad():
        model(tokens)
    layers = sum(1 for name, _ in model.named_modules() if name.endswith("mlp.experts"))
    assert calls == (["scatter2scatter"] * 2 if model_type == "gpt_oss" else ["moe_mlp"]) * layers


def test_a_model_trains_alike_from_pretrained(tmp_path):
    tiny("qwen3_moe")[0].save_pretrained(tmp_path)
    losses = {}
    for implementation in ("scatterfold", "eager"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
        assert model.config._experts_implementation == implementation
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        tokens = torch.arange(40).view(2, 20) % 7
        losses[implementation] = []
        for _ in range(4):
            loss = model(tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[implementation].append(loss.item())
    assert losses["scatterfold"][-1] < 0.9 * losses["scatterfold"][0]
    assert losses["scatterfold"] == pytest.approx(losses["eager"], rel=1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(model_type):
    exact, tokens = tiny(model_type)
    wanted = results(exact.float(), tokens, "eager")
    model = exact.bfloat16()
    ours, theirs = (results(model, tokens, name) for name in ("scatterfold", "grouped_mm"))
    for name in ("logits", *(n for n in ours if "experts" in n)):
        assert ours[name].dtype == torch.bfloat16
        error = [(result[name].float() - wanted[name]).norm() / wanted[name].norm() for result in (ours, theirs)]
        assert error[0] < 1.3 * error[1] + 1e-3, name


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradient_checkpointing_changes_nothing():
    model, tokens = tiny("mixtral")
    plain = results(model, tokens, "scatterfold")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = results(model, tokens, "scatterfold")
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_autocast_computes_in_its_dtype():
    for model_type in ("mixtral", "gpt_oss"):
        model, tokens = tiny(model_type)
        outputs = {}
        for name in ("scatterfold", "eager"):
            model.set_experts_implementation(name)
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                outputs[name] = model(tokens).logits.float()
        torch.testing.assert_close(outputs["scatterfold"], outputs["eager"], rtol=0.05, atol=0.05)


def experts(act: nn.Module, gate: bool = True, **options) -> nn.Module:
    """An experts module as transformers' decorator leaves it."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, rows = 3, 2 * 8 if gate else 8
            shapes = {"gate_up_proj" if gate else "up_proj": (rows, 6), "down_proj": (6, 8)}
            for name, (out, width) in shapes.items():
                size = (width, out) if options.get("is_transposed") else (out, width)
                self.register_parameter(name, nn.Parameter(torch.randn(3, *size)))
                if options.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(3, out)))
            self.act_fn = act
            self.post_expert_norm = nn.RMSNorm(6) if options.get("has_post_expert_norm") else None

        def forward(self, hidden, index, weights):
            raise NotImplementedError

    torch.manual_seed(1)
    decorated = use_experts_implementation(Experts, has_gate=gate, **options)
    return decorated(SimpleNamespace(_experts_implementation="scatterfold"))


VARIANTS = {
    "gelu": ({"act": nn.GELU()}, "moe_mlp"),
    "relu": ({"act": nn.ReLU()}, "moe_mlp"),
    "gelu by tanh": ({"act": nn.GELU(approximate="tanh")}, "scatter2scatter"),
    "sigmoid": ({"act": nn.Sigmoid()}, "scatter2scatter"),
    "no gate": ({"act": nn.SiLU(), "gate": False}, "moe_mlp"),
    "no gate, tanh": ({"act": nn.Tanh(), "gate": False, "has_bias": True}, "scatter2scatter"),
    "biases": ({"act": nn.SiLU(), "has_bias": True}, "moe_mlp"),
    "transposed": ({"act": nn.SiLU(), "is_transposed": True}, "scatter2scatter"),
    "transposed, biases": ({"act": nn.SiLU(), "is_transposed": True, "has_bias": True}, "scatter2scatter"),
    "norm": ({"act": nn.SiLU(), "has_post_expert_norm": True}, "scatter2scatter"),
    "norm, biases": ({"act": nn.SiLU(), "has_post_expert_norm": True, "has_bias": True}, "scatter2scatter"),
}


@pytest.mark.parametrize("parallel", [False, True], ids=["", "expert parallel"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_experts(variant, parallel, monkeypatch):
    """Against transformers' formula of gathered weights; under expert parallelism some ids are those of other ranks."""
    options, way = VARIANTS[variant]
    module = experts(**options).double()
    module._is_expert_parallel = parallel
    index = torch.tensor([[0, 2], [1, 0], [2, 1], [1, 2], [0, 1]])
    if parallel:
        index = torch.where(torch.rand(5, 2) < 0.4, 3, index)
    used = []
    real = getattr(plugin, way)
    monkeypatch.setattr(plugin, way, lambda *a, **k: used.append(way) or real(*a, **k))

    def run(forward):
        module.zero_grad()
        x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        weights = torch.linspace(0.1, 0.9, 10, dtype=torch.float64).view(5, 2).requires_grad_()
        masked = torch.where(index == 3, 0, weights)  # as transformers' dispatch leaves them
        out = forward(module, x, index, masked)
        out.square().sum().backward()
        return [out.detach(), x.grad, weights.grad, *(p.grad.clone() for p in module.parameters())]

    ours = run(lambda module, *inputs: module(*inputs))
    assert used
    for got, wanted in zip(ours, run(batched_mm_experts_forward)):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_no_tokens_and_idle_experts():
    module = experts(nn.SiLU())
    assert module(torch.zeros(0, 6), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)).shape == (0, 6)
    x, index, weights = torch.randn(4, 6), torch.tensor([[1, 0]] * 4), torch.rand(4, 2)
    torch.testing.assert_close(module(x, index, weights), batched_mm_experts_forward(module, x, index, weights))


def test_what_cannot_be_done_is_one_line(monkeypatch):
    x, index, weights = torch.randn(4, 6), torch.tensor([[1, 0]] * 4), torch.rand(4, 2)
    module = experts(nn.SiLU())
    module.down_proj = nn.Parameter(module.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ConfigError, match=r"cannot multiply weights in torch.float8_e4m3fn \(Experts\), allowed: f"):
        module(x, index, weights)
    with pytest.raises(ConfigError, match="no kernels for FP8 weights"):
        ALL_FP8_EXPERTS_FUNCTIONS["scatterfold"](module, x, index, weights)
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ConfigError, match=r"transformers=5.* lets nobody add an experts implementation, allowed: 5.0"):
        plugin.register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="register.. needs transformers, which is not installed, allowed: pip"):
        plugin.register()
