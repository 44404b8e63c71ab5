"""Whether an entry computes what it is measured for: some rows against a float64 loop over tokens and experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Case, Layer

ROWS = 16
# In norm, relative. Rounding of inputs between the GEMMs stays well below; a wrong weight, a dropped token or a product
# in a lower precision than the dtype's does not.
ALLOWED = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Reference:
    """Output and gradient of x for some tokens, in float64."""

    rows: Tensor
    out: Tensor
    grad_x: Tensor

    def error(self, out: Tensor, grad_x: Tensor) -> float:
        """The larger of both relative errors; infinite for a result of another shape or that is not finite."""
        errors = [0.0]
        for ours, right in ((out, self.out), (grad_x, self.grad_x)):
            if ours.dim() != 2 or ours.shape[1] != right.shape[1] or ours.shape[0] <= int(self.rows.max()):
                return float("inf")
            errors.append(float((ours[self.rows].double() - right).norm() / right.norm()))
        return max(errors) if all(error == error for error in errors) else float("inf")


def reference(case: Case) -> Reference:
    """Rows spread over all tokens, one token and expert after the other."""
    count = min(ROWS, case.shape.tokens)
    rows = torch.linspace(0, case.shape.tokens - 1, count, device=case.device).long()
    outs, grads = [], []
    for row in rows.tolist():
        x = case.x[row].double().requires_grad_()
        out = torch.zeros_like(x)
        for expert, weight in zip(case.experts[row].tolist(), case.weights[row].double()):
            gate, up = (case.w_in[expert].double() @ x).chunk(2)
            out = out + weight * (case.w_out[expert].double() @ (gate * torch.sigmoid(gate) * up))
        outs.append(out.detach())
        grads.append(torch.autograd.grad(out, x, case.grad[row].double())[0])
    return Reference(rows, torch.stack(outs), torch.stack(grads))


def fault(layer: Layer, out: Tensor, error: float, dtype: torch.dtype) -> str | None:
    """What is wrong with a layer after a forward and a backward; None if nothing is."""
    if error > ALLOWED[dtype]:
        return f"computes something else: relative error {error:.1e}, {ALLOWED[dtype]:.0e} is allowed"
    if any(parameter.grad is None for parameter in layer.parameters):
        return "computes no gradient for some of its weights"
    if layer.weights is not None and layer.weights.grad is None:
        return "computes no gradient for the combine weights"
    if out.dtype != dtype:
        return f"returns {str(out.dtype).removeprefix('torch.')}"
    return None
