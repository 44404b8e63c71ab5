"""`moe_mlp_quack` against a float64 loop, its kernels replaced by plain loops with the same signatures."""

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from scatterfold.kernels import ACTIVATIONS, ConfigError, Routing, backends, moe_mlp, quack_backend
from scatterfold.kernels.backends import check_serves, choose_backend
from scatterfold.kernels.quack_backend import moe_mlp_quack
from scatterfold.tests.kernels.expert_problem import (
    NAMES,
    TOLERANCE,
    ExpertProblem,
    check,
    check_without_assignments,
    only_gradient,
    run,
    some_experts,
)

FAKE = Path(__file__).with_name("fake_quack.py")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture
def quack(monkeypatch):
    """The loops in the place of the package."""
    spec = importlib.util.spec_from_file_location("quack.gemm_interface", FAKE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    package = types.ModuleType("quack")
    package.gemm_interface = module
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", module)
    monkeypatch.delenv("SCATTERFOLD_AUTOTUNE", raising=False)
    return module


@pytest.fixture
def hopper(monkeypatch):
    """An H100 with quack, as far as the table can tell."""
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    version(monkeypatch, "0.6.5")
    capability(monkeypatch, 9, 0)


def version(monkeypatch, number):
    monkeypatch.setattr(quack_backend, "PACKAGE_REFUSES", quack_backend._package_refuses(number))


def capability(monkeypatch, major, minor):
    properties = types.SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


class Problem(ExpertProblem):
    """A variable number of experts per token, an expert and a token without any."""

    function = staticmethod(moe_mlp_quack)

    def __init__(self, activation="swiglu", dtype=torch.bfloat16, bias=True, padding=5, tokens=19):
        generator = torch.Generator().manual_seed(0)
        super().__init__(some_experts(tokens, generator), tokens, 5, generator, activation, dtype, bias, padding)


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_with_biases_and_padding(activation, recompute, quack):
    check(Problem(activation), recompute=recompute)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_biases(dtype, activation, quack):
    check(Problem(activation, dtype, bias=False, padding=0))


def test_activation_and_its_gradient_run_in_epilogues(quack):
    Problem("swiglu").ours()
    assert quack.calls == ["gemm_act", "gemm", "gemm_dact", "gemm", "gemm", "gemm"]
    quack.calls.clear()
    Problem("geglu").ours()  # quack has no exact GELU
    assert set(quack.calls) == {"gemm"}


def test_weights_that_are_stored_otherwise(quack):
    problem = Problem()
    leaves, expected = problem.leaves(), problem.ours()
    transposed = {name: leaves[name].detach().mT.contiguous().mT.requires_grad_() for name in ("w_in", "w_out")}
    out = run(problem, leaves | transposed)
    out.backward(problem.grad)
    assert torch.equal(out, expected["out"])
    assert all(torch.equal(t.grad, expected[name]) for name, t in transposed.items())


def test_an_expanded_gradient_is_taken(quack):
    problem = Problem()
    leaves = problem.leaves()
    run(problem, leaves).sum().backward()
    problem.grad = torch.ones_like(problem.grad)
    assert torch.equal(leaves["x"].grad, problem.ours()["x"])


@pytest.mark.parametrize("tokens", [0, 4])
def test_no_assignment(tokens, quack):
    check_without_assignments(Problem(tokens=tokens), (tokens, 16))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_needed_gradient(name, quack):
    problem = Problem()
    expected = problem.expected()[name]
    assert (only_gradient(problem, name).double() - expected).norm() <= TOLERANCE[problem.dtype] * expected.norm()


@pytest.mark.parametrize(("recompute", "rows_bytes"), [("none", 4 * 8), ("all", 0)])
def test_saved_bytes_follow_the_formula(recompute, rows_bytes, quack):
    problem, saved = Problem(bias=False), {}
    leaves = problem.leaves()

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(problem, leaves, recompute=recompute)
    x, w_in, w_out = (leaves[name] for name in NAMES[:3])
    tables, rows = problem.routing, problem.routing.token.numel()
    table_bytes = 4 * (3 * rows + tables.expert_offsets.numel() + tables.token_offsets.numel())
    parameters = 2 * (w_in.numel() + w_out.numel())  # saved by reference, no activation memory
    assert sum(saved.values()) == 2 * x.numel() + rows_bytes * rows + table_bytes + parameters


def test_compiles_without_graph_break(quack):
    problem = Problem(padding=0)
    leaves, again = problem.leaves(), problem.leaves()
    expected = run(problem, leaves)
    expected.backward(problem.grad)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(problem, again)
    compiled.backward(problem.grad)
    assert torch.equal(compiled, expected)
    assert all(torch.equal(leaves[name].grad, again[name].grad) for name in NAMES)


def test_widths_it_does_not_take(quack):
    routing = Routing.from_topk(torch.zeros(1, 1).long(), torch.ones(1, 1), 1)
    w_in, w_out = torch.zeros(1, 12, 16).bfloat16(), torch.zeros(1, 16, 12).bfloat16()
    with pytest.raises(ConfigError, match="cannot run: quack needs widths that are multiples of 8, this one is 12$"):
        moe_mlp_quack(torch.zeros(1, 16).bfloat16(), w_in, w_out, routing, "relu")


def test_tuning_only_if_asked_for(quack, monkeypatch):
    assert quack_backend._options() == {"dynamic_scheduler": False, "tuned": False}
    monkeypatch.setenv("SCATTERFOLD_AUTOTUNE", "1")
    assert quack_backend._options()["tuned"]


@pytest.mark.parametrize(
    ("number", "device", "dtype", "device_has", "message"),
    [
        (None, CUDA, torch.bfloat16, (9, 0), r"not installed \(pip install scatterfold\[quack\]\)"),
        ("0.6.4", CUDA, torch.bfloat16, (9, 0), "quack-kernels 0.6.4 is installed, allowed: >=0.6.5,<0.7"),
        ("0.10.0", CUDA, torch.bfloat16, (9, 0), "quack-kernels 0.10.0 is installed, allowed: >=0.6.5,<0.7"),
        ("0.6.5", CUDA, torch.float32, (9, 0), "no float32, only bfloat16 and float16"),
        ("0.6.5", CPU, torch.bfloat16, (9, 0), "needs a GPU, this is cpu"),
        ("0.6.5", CUDA, torch.bfloat16, (8, 9), "needs compute capability 9.0 to 12.x, this device has 8.9"),
    ],
)
def test_refusals_fit_one_line(number, device, dtype, device_has, message, hopper, monkeypatch):
    version(monkeypatch, number)
    capability(monkeypatch, *device_has)
    with pytest.raises(ConfigError, match=message) as error:
        check_serves("quack", types.SimpleNamespace(device=device, dtype=dtype, shape=(4, 16)))
    assert str(error.value).startswith("experts.backend='quack' cannot run: ") and "\n" not in str(error.value)


def test_moe_mlp_refuses_by_name_and_by_environment(monkeypatch):
    version(monkeypatch, None)
    problem = Problem(bias=False, padding=0)
    x, w_in, w_out, *_ = problem.inputs.values()
    with pytest.raises(ConfigError, match="experts.backend='quack' cannot run"):
        moe_mlp(x, w_in, w_out, problem.routing, "swiglu", "quack")
    monkeypatch.setenv(backends.VARIABLE, "quack")
    with pytest.raises(ConfigError, match="experts.backend='quack' cannot run"):
        moe_mlp(x, w_in, w_out, problem.routing, "swiglu")


def test_it_is_not_chosen_before_it_is_measured_faster(hopper, monkeypatch):
    choice = choose_backend(CUDA, torch.bfloat16, 512, 256)
    assert choice.backend != "quack" and choice.why.endswith("not measured (experts.backend=quack tries it)")
    assert "quack" not in choose_backend(CUDA, torch.float32, 512, 256).why
    monkeypatch.setattr(quack_backend, "QUACK_IS_FASTER", True)
    assert choose_backend(CUDA, torch.bfloat16, 512, 256).backend == "quack"
    assert choose_backend(CUDA, torch.bfloat16, 512, 12).backend != "quack"
    assert choose_backend(CPU, torch.bfloat16, 512, 256).backend in ("native", "cpu")


def test_the_loops_have_the_signatures_of_the_package():
    source = installed().locate_file("quack/gemm_interface.py")
    ours, theirs = signatures(FAKE), signatures(Path(str(source)))
    for name in ("gemm", "gemm_act", "gemm_dact"):
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("activation", ["swiglu", "silu", "geglu"])
def test_the_package_compiles_what_we_launch_for_hopper(activation):
    """The checks on the host and the compiler of the package itself, for sm_90; only launches are left out."""
    installed()
    environment = os.environ | {"QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", COMPILE, activation]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["launched", "7"]  # up, down; up again, dact, two weight gradients, dx


COMPILE = """
import sys
import torch
import quack.gemm, quack.gemm_runtime.host
from scatterfold.kernels import Routing
from scatterfold.kernels.quack_backend import moe_mlp_quack
from scatterfold.tests.kernels.expert_problem import NAMES, TOLERANCE, ExpertProblem, check, run, some_experts

launched = []
for module in (quack.gemm, quack.gemm_runtime.host):
    module.launch_gemm = lambda *arguments: launched.append(arguments[0].compiled_fn)
    module.get_max_active_clusters = lambda *arguments, **options: 66

def leaf(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()

activation = sys.argv[1]
rows = 128 if activation.endswith("glu") else 64
routing = Routing.from_topk(torch.rand(64, 4).topk(2).indices, torch.rand(64, 2, requires_grad=True), 4)
leaves = leaf(64, 128), leaf(4, rows, 128), leaf(4, 128, 64)
out = moe_mlp_quack(*leaves, routing, activation, leaf(4, rows), leaf(4, 128), recompute="all")
out.backward(torch.ones_like(out))
assert all(launched)
print("launched", len(launched))
"""


def installed():
    try:
        return importlib.metadata.distribution("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("quack-kernels is not installed")


def signatures(path):
    """Names, kinds and defaults of the arguments of each function of a file, without importing it."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for argument in ast.walk(function.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
    return {function.name: ast.unparse(function.args) for function in functions}
