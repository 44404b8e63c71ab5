"""What tests of a single backend share: random inputs with poisoned padding, and the float64 loop to compare with."""

import torch

from scatterfold.kernels import Routing, is_gated
from scatterfold.kernels.activations import activate

# Error in norm over the norm: at most six values between inputs and result are rounded to the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 6 * 2**-22, torch.float16: 6 * 2**-11, torch.bfloat16: 6 * 2**-9}
NAMES = ("x", "w_in", "w_out", "b_in", "b_out", "weight")


def some_experts(tokens, generator, experts=5):
    """Pairs of a token and an expert: a variable number per token, and an expert and a token without any."""
    chosen = torch.rand(tokens, experts, generator=generator) < 0.5
    chosen[:, 1], chosen[3:4] = False, False
    return chosen.nonzero(as_tuple=True)


class ExpertProblem:
    """Random inputs of the layer that `function`, a backend, computes; padding is NaN, or far out of bounds."""

    function: staticmethod

    def __init__(self, pairs, tokens, experts, generator, activation, dtype, bias, padding, width=16, expert_width=8):
        hidden = 2 * expert_width if is_gated(activation) else expert_width

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        token, expert = pairs
        weight_dtype = torch.promote_types(dtype, torch.float32)
        self.activation, self.dtype, self.count = activation, dtype, len(token)
        self.inputs = {
            "x": randn(tokens, width),
            "w_in": randn(experts, hidden, width) / width**0.5,
            "w_out": randn(experts, width, expert_width) / expert_width**0.5,
            "b_in": randn(experts, hidden) if bias else None,
            "b_out": randn(experts, width) if bias else None,
        }
        weight = torch.rand(len(token), generator=generator, dtype=torch.float64).to(weight_dtype)
        routing = Routing.from_assignments(token, expert, weight, tokens, experts)
        self.pairs = list(zip(routing.token.tolist(), sorted(expert.tolist()), strict=True))
        self.inputs["weight"] = torch.cat([routing.weight, torch.full((padding,), torch.nan, dtype=weight_dtype)])
        huge = torch.full((padding,), 2**30, dtype=torch.int32)
        self.routing = Routing(
            torch.cat([routing.token, huge]),
            self.inputs["weight"],
            routing.expert_offsets,
            torch.cat([routing.assignment, huge]),
            routing.token_offsets,
        )
        self.grad = randn(tokens, width)

    def leaves(self, dtype=None):
        return {
            name: None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
            for name, t in self.inputs.items()
        }

    def ours(self, **options):
        leaves = self.leaves()
        out = run(self, leaves, **options)
        out.backward(self.grad)
        return {"out": out.detach()} | {name: t.grad for name, t in leaves.items() if t is not None}

    def expected(self):
        leaves = self.leaves(torch.float64)
        x, w_in, w_out, b_in, b_out, weight = leaves.values()
        rows = [torch.zeros(x.shape[1], dtype=torch.float64)] * len(x)
        for index, (token, expert) in enumerate(self.pairs):
            h = w_in[expert] @ x[token]
            y = w_out[expert] @ activate(self.activation, h if b_in is None else h + b_in[expert])
            rows[token] = rows[token] + weight[index] * (y if b_out is None else y + b_out[expert])
        out = torch.stack(rows)
        out.backward(self.grad.double())
        return {"out": out.detach()} | {name: t.grad for name, t in leaves.items() if t is not None}

    def without_assignments(self):
        """The same layer where no token takes an expert."""
        experts = self.routing.num_experts
        tokens = len(self.inputs["x"])
        self.routing = Routing.from_assignments(*torch.zeros(2, 0).long(), torch.zeros(0), tokens, experts)
        self.inputs["weight"] = self.routing.weight
        return self


def run(problem, leaves, **options):
    x, w_in, w_out, b_in, b_out, weight = leaves.values()
    routing = problem.routing.with_weight(weight)
    return problem.function(x, w_in, w_out, routing, problem.activation, b_in, b_out, **options)


def only_gradient(problem, name):
    """The gradient of one input where no other needs one, and none is computed for another."""
    leaves = {key: t.requires_grad_(key == name) for key, t in problem.leaves().items()}
    run(problem, leaves).backward(problem.grad)
    assert [key for key, t in leaves.items() if t.grad is not None] == [name]
    return leaves[name].grad


def check_without_assignments(problem, shape, **options):
    """Where no token takes an expert, everything is zero."""
    results = problem.without_assignments().ours(**options)
    assert results["out"].shape == shape
    assert all(not value.any() for value in results.values())


def check(problem, **options):
    results, expected = problem.ours(**options), problem.expected()
    assert results.keys() == expected.keys()
    for name, reference in expected.items():
        assert results[name].isfinite().all(), name
        error = (results[name].double() - reference).norm()
        assert error <= TOLERANCE[problem.dtype] * reference.norm(), name
