"""`scatter2scatter` against a float64 loop over assignments. Also run on Triton's interpreter."""

import os

import pytest
import torch

from scatterfold.kernels import Routing
from scatterfold.kernels.errors import ConfigError
from scatterfold.kernels.scatter2scatter import SIDES, scatter2scatter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPE = torch.float32 if INTERPRETED else torch.float64
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2**-20, torch.bfloat16: 3 * 2**-8}
TOKENS, EXPERTS, WIDTH, OUTPUTS = 13, 4, 10, 6


class Problem:
    """A variable number of experts per token, one token and one expert without any, and padding at the end."""

    def __init__(self, x_side, y_side, dtype=DTYPE, padding=3, bias=True):
        generator = torch.Generator().manual_seed(0)
        chosen = torch.rand(TOKENS, EXPERTS, generator=generator) < 0.6
        chosen[2], chosen[:, 1] = False, False
        pairs = chosen.nonzero()
        self.by_token = [(int(t), int(e)) for t, e in pairs]
        self.by_expert = sorted(self.by_token, key=lambda pair: (pair[1], pair[0]))
        count = self.count = len(pairs)
        self.x_side, self.y_side, self.dtype = x_side, y_side, dtype

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.x = randn(TOKENS if x_side == "token" else count + padding, WIDTH)
        if x_side != "token":
            self.x[count:] = float("nan")
        self.w = randn(EXPERTS, OUTPUTS, WIDTH)
        self.bias = randn(EXPERTS, OUTPUTS) if bias else None
        weight_dtype = torch.promote_types(dtype, torch.float32)
        self.weight = torch.rand(count + padding, generator=generator, dtype=torch.float64).to(weight_dtype)
        routing = Routing.from_assignments(pairs[:, 0], pairs[:, 1], torch.ones(count), TOKENS, EXPERTS)
        huge = torch.full((padding,), 2**30, dtype=torch.int32)
        self.routing = Routing(
            torch.cat([routing.token, huge]),
            self.weight,
            routing.expert_offsets,
            torch.cat([routing.assignment, huge]),
            routing.token_offsets,
        )
        self.grad = randn(TOKENS if y_side == "token" else count + padding, OUTPUTS)

    def ours(self):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (self.x, self.w, self.weight, self.bias)]
        x, w, weight, bias = leaves
        y = scatter2scatter(x, w, self.routing.with_weight(weight), self.x_side, self.y_side, bias)
        y.backward(self.grad)
        return [y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves if t is not None)]

    def expected(self):
        leaves = [None if t is None else t.double().requires_grad_() for t in (self.x, self.w, self.weight, self.bias)]
        x, w, weight, bias = leaves
        place = {side: {p: i for i, p in enumerate(order)} for side, order in self.orders()}
        rows = [torch.zeros(OUTPUTS, dtype=torch.float64)] * len(self.grad)
        for pair in self.by_token:
            token, expert = pair
            y = w[expert] @ x[token if self.x_side == "token" else place[self.x_side][pair]]
            if bias is not None:
                y = y + bias[expert]
            if self.y_side == "token":
                rows[token] = rows[token] + weight[place["expert"][pair]] * y
            else:
                rows[place[self.y_side][pair]] = y
        out = torch.stack(rows)
        out.backward(self.grad.double())
        return [out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves if t is not None)]

    def orders(self):
        return ("slot", self.by_token), ("expert", self.by_expert)


def check(problem):
    for result, expected in zip(problem.ours(), problem.expected(), strict=True):
        assert not result.isnan().any()
        assert (result.double() - expected).norm() <= TOLERANCE[problem.dtype] * expected.norm()


@pytest.mark.parametrize("x_side", SIDES)
@pytest.mark.parametrize("y_side", SIDES)
def test_every_pair_of_sides_equals_the_loop(x_side, y_side):
    check(Problem(x_side, y_side))


@pytest.mark.parametrize("y_side", SIDES)
def test_bfloat16_without_bias(y_side):
    check(Problem("token", y_side, torch.bfloat16, bias=False))


def test_two_layers_there_and_back_equal_one_expert_after_the_other():
    """Token to slot, slot to token: the way through attention heads chosen per token."""
    problem = Problem("token", "slot", padding=0, bias=False)
    w_back = torch.randn(EXPERTS, WIDTH, OUTPUTS, dtype=problem.dtype)
    heads = scatter2scatter(problem.x, problem.w, problem.routing, "token", "slot")
    out = scatter2scatter(heads, w_back, problem.routing, "slot", "token")
    expected = torch.zeros(TOKENS, WIDTH, dtype=problem.dtype)
    for index, (token, expert) in enumerate(problem.by_expert):
        expected[token] += problem.weight[index] * (w_back[expert] @ (problem.w[expert] @ problem.x[token]))
    torch.testing.assert_close(out, expected)


@pytest.mark.skipif(INTERPRETED, reason="float64 takes no Triton kernel")
def test_gradcheck():
    problem = Problem("token", "token", torch.float64)

    def run(x, w, weight, bias):
        return scatter2scatter(x, w, problem.routing.with_weight(weight), "token", "token", bias)

    inputs = (problem.x, problem.w, problem.weight, problem.bias)
    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in inputs], fast_mode=True)


@pytest.mark.skipif(INTERPRETED, reason="nothing of the kernels in it")
def test_errors_name_side_and_shape():
    problem = Problem("token", "expert")
    with pytest.raises(ConfigError, match="y_side='rows' is unknown, allowed: token, slot, expert"):
        scatter2scatter(problem.x, problem.w, problem.routing, "token", "rows")
    with pytest.raises(ConfigError, match="x_side='slot'"):
        scatter2scatter(problem.x, problem.w, problem.routing, "slot", "expert")
