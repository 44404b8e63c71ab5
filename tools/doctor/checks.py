"""Whether the kernels compute correctly here: output and gradients of every backend that runs, against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import BACKENDS, ConfigError, Routing, moe_mlp
from ...kernels.availability import interprets
from ...kernels.backends import check_serves
from .choices import DTYPES, devices

ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ROUNDED_VALUES = 6  # at most so many values between inputs and result are rounded to the dtype
NAMES = ("output", "gradient of x", "gradient of w_in", "gradient of w_out", "gradient of the combine weights")
TOKENS, WIDTH, EXPERT_WIDTH, EXPERTS = 300, 160, 96, 6
SMALL: dict[str, Any] = {"tokens": 9, "width": 16, "expert_width": 16, "experts": 2}  # for Triton's interpreter


@dataclass(frozen=True)
class NumericCheck:
    """One compared tensor: its error in norm over its norm, what rounding explains, or why there is no number."""

    device: str
    backend: str
    dtype: str
    name: str
    error: float | None
    allowed: float | None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.allowed is not None and self.error <= self.allowed  # False for NaN

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def check_backends() -> list[NumericCheck]:
    """Every backend but the reference, on every device that it runs on, in every dtype that it takes."""
    checks = []
    for device in devices():
        for dtype_name, dtype in DTYPES.items():
            for backend in BACKENDS:
                if backend != "reference" and _serves(backend, device, dtype):
                    checks += _check(backend, device, dtype_name, dtype)
    return checks


def _serves(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        check_serves(backend, torch.empty(0, WIDTH, device=device, dtype=dtype))
    except ConfigError:
        return False
    return True


def _check(backend: str, device: torch.device, dtype_name: str, dtype: torch.dtype) -> list[NumericCheck]:
    """A kernel that raises has failed its check, too."""
    run = _check_triton if backend == "triton" else _compare
    try:
        results = run(backend, device, dtype)
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return [NumericCheck(device.type, backend, dtype_name, "all", None, None, problem)]
    return [NumericCheck(device.type, backend, dtype_name, name, error, allowed) for name, error, allowed in results]


def _check_triton(backend: str, device: torch.device, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    from ...kernels.triton_backend.self_check import self_check  # imports triton

    checks = self_check(device, dtype, **(SMALL if interprets() else {}))
    return [(check.name, check.error, check.allowed) for check in checks]


def _compare(backend: str, device: torch.device, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    # A variable number of experts per token, and one expert that nobody takes.
    chosen = torch.rand(TOKENS, EXPERTS, generator=generator) < 0.4
    chosen[:, 1] = False
    token, expert = chosen.to(device).nonzero(as_tuple=True)
    weight = torch.rand(token.numel(), generator=generator).to(device)
    routing = Routing.from_assignments(token, expert, weight, TOKENS, EXPERTS)
    w_in = randn(EXPERTS, 2 * EXPERT_WIDTH, WIDTH, scale=WIDTH**-0.5)
    inputs = (randn(TOKENS, WIDTH), w_in, randn(EXPERTS, WIDTH, EXPERT_WIDTH, scale=0.1), routing.weight.detach())
    grad = randn(TOKENS, WIDTH)

    def with_gradients(function: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        x, w_in, w_out = (t.to(to, copy=True).requires_grad_() for t in inputs[:3])
        weights = inputs[3].to(torch.promote_types(to, torch.float32), copy=True).requires_grad_()
        out = function(x, w_in, w_out, routing.with_weight(weights))
        return [out.detach(), *torch.autograd.grad(out, (x, w_in, w_out, weights), grad.to(to))]

    ours = with_gradients(lambda *args: moe_mlp(*args, backend=backend), dtype)
    right = with_gradients(_loop, torch.float64)
    allowed = ROUNDED_VALUES * ROUNDING[dtype]
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, right)]
    return [(name, error, allowed) for name, error in zip(NAMES, errors)]


def _loop(x: Tensor, w_in: Tensor, w_out: Tensor, routing: Routing) -> Tensor:
    """The definition, one expert after the other, by autograd."""
    out = torch.zeros_like(x)
    ends = routing.expert_offsets.tolist()
    for expert, (start, end) in enumerate(zip(ends, ends[1:])):
        token = routing.token[start:end].long()
        gate, up = (x[token] @ w_in[expert].T).chunk(2, dim=-1)
        rows = (gate * gate.sigmoid() * up) @ w_out[expert].T
        out = out.index_add(0, token, routing.weight[start:end, None] * rows)
    return out
