"""Scatterfold's expert kernels inside the models of transformers.

    from scatterfold.moe.interop.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="scatterfold")

or, on a model in memory, `model.set_experts_implementation("scatterfold")`. Nothing else of the model changes: its
router, its parameters and their names, its checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ConfigError, Routing, moe_mlp, scatter2scatter
from ...kernels.scatter2scatter import weighted_sum

NAME = "scatterfold"

_GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}
_HOME = "transformers.integrations.moe"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def register() -> str:
    """Add `experts_implementation="scatterfold"` to transformers; returns that name. May be called more than once.

    It serves every model whose experts transformers lets one choose an implementation for: experts that are gated or
    not, with biases, with transposed weights, with a gate of their own (GPT-OSS), with a norm behind each expert, and
    as one rank's part of expert parallelism. Weights in FP8 are refused at the first forward pass.

    Raises: ConfigError if transformers is missing, or too old to have experts implementations (before 5.0).
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "register() needs transformers, which is not installed, allowed: pip install scatterfold[hf]"
        ) from None
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        raise ConfigError(
            f"transformers={transformers.__version__} lets nobody add an experts implementation, allowed: 5.0 or newer"
        ) from None
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    try:  # experts in FP8 have a table of their own, whose own error would not say why
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:
        return NAME
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, _refuse_fp8)
    return NAME


def experts_forward(experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of an experts module of transformers: sum over k of weight * expert(hidden).

    One fused operator where the experts are an activation that `kernels.moe_mlp` knows; two grouped GEMMs with the
    module's own gate or norm between them elsewhere.

    Args:
        experts: a module under transformers' `use_experts_implementation`, or with the same attributes.
        hidden: (T, D).
        top_k_index: (T, K) expert ids; under expert parallelism local ones, and E for the experts of other ranks.
        top_k_weights: (T, K) combine weights.

    Returns: (T, D), of hidden's dtype.
    Raises: ConfigError for weights of a dtype that no kernel multiplies.
    """
    w_in, b_in = _first_weights(experts)
    w_out, b_out = experts.down_proj, _bias(experts, "down_proj_bias")
    for weight in (w_in, w_out):
        if weight.dtype not in _FLOATS:
            raise ConfigError(
                f"experts_implementation='{NAME}' cannot multiply weights in {weight.dtype} "
                f"({type(experts).__name__}), allowed: float32, bfloat16, float16, float64"
            )
    if experts.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))
    keep = top_k_index < w_out.shape[0] if getattr(experts, "_is_expert_parallel", False) else None
    routing = Routing.from_topk(top_k_index, weights, w_out.shape[0], keep)
    activation = _fused_activation(experts)
    x = hidden.to(w_out.dtype)
    if activation is not None:
        out = moe_mlp(x, w_in, w_out, routing, activation, b_in=b_in, b_out=b_out)
    else:
        out = _composed(experts, x, w_in, w_out, routing, b_in, b_out)
    return out.to(hidden.dtype)


def _composed(
    experts: Any,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    routing: Routing,
    b_in: Tensor | None,
    b_out: Tensor | None,
) -> Tensor:
    """Grouped GEMM, the module's own gate or activation, grouped GEMM, its norm, sum by token."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
        b_in, b_out = (None if bias is None else bias.to(dtype) for bias in (b_in, b_out))
    hidden = scatter2scatter(x, w_in, routing, "token", "expert", b_in)
    inner: Any = experts._apply_gate if _has_gate(experts) else experts.act_fn
    hidden = inner(hidden).to(w_out.dtype)
    if not getattr(experts, "has_post_expert_norm", False):
        return scatter2scatter(hidden, w_out, routing, "expert", "token", b_out)
    norm: Any = experts.post_expert_norm
    return weighted_sum(norm(scatter2scatter(hidden, w_out, routing, "expert", "expert", b_out)), routing)


def _fused_activation(experts: Any) -> str | None:
    """The activation of `moe_mlp` that these experts are; None if they do something else between their GEMMs.

    Weights that are stored transposed go another way too: grouped GEMMs read them as they are, and not every backend
    of `moe_mlp` does so without a copy.
    """
    if getattr(experts, "has_post_expert_norm", False) or experts.is_transposed:
        return None
    name = _activation_name(getattr(experts, "act_fn", None))
    if not _has_gate(experts):
        return name
    plain_gate = type(experts)._apply_gate.__module__ == _HOME  # act(gate) * up; otherwise the model has its own
    return _GATED.get(name or "") if plain_gate else None


def _activation_name(act: Any) -> str | None:
    """silu, gelu (by the error function), relu or relu2, if this module or function is one of them."""
    if act is F.silu or type(act).__name__ in ("SiLU", "SiLUActivation"):
        return "silu"
    if act is F.gelu or getattr(act, "act", None) is F.gelu or (isinstance(act, nn.GELU) and act.approximate == "none"):
        return "gelu"
    if act is F.relu or type(act) is nn.ReLU:
        return "relu"
    return "relu2" if type(act).__name__ == "ReLUSquaredActivation" else None


def _has_gate(experts: Any) -> bool:
    return bool(getattr(experts, "has_gate", True))  # before transformers 5.1 all experts had one


def _first_weights(experts: Any) -> tuple[Tensor, Tensor | None]:
    stem = "gate_up_proj" if _has_gate(experts) else "up_proj"
    return getattr(experts, stem), _bias(experts, f"{stem}_bias")


def _bias(experts: Any, name: str) -> Tensor | None:
    return getattr(experts, name) if getattr(experts, "has_bias", False) else None


def _refuse_fp8(experts: Any, *_: Tensor) -> Tensor:
    raise ConfigError(
        f"experts_implementation='{NAME}' has no kernels for FP8 weights ({type(experts).__name__}), "
        "allowed: weights in float32, bfloat16 or float16, or experts_implementation='grouped_mm'"
    )
