"""Every kernel compiles for sm_90, on a machine without a GPU, and what decides its speed is in the machine code.

What is compiled are the launches that the host code really makes, recorded on meta tensors. SCATTERFOLD_COMPILE_ALL=1
compiles every configuration, dtype and activation (about ten minutes); otherwise the defaults of common cases.
"""

import os
import re
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402

from scatterfold.kernels import ACTIVATIONS, is_gated  # noqa: E402
from scatterfold.kernels.fused_operator import ExpertLayer  # noqa: E402
from scatterfold.kernels.triton_backend import configs, launch, listed_routing, ops, resources, routing  # noqa: E402

ALL = os.environ.get("SCATTERFOLD_COMPILE_ALL") == "1"
TENSOR_CORE_KERNELS = {"up_kernel", "rows_kernel", "dact_kernel", "weight_grad_kernel"}


def recorded(rows_per_expert, dtype, activation="swiglu", bias=False, experts=8, width=1024, expert_width=512):
    """The launches of a forward and a backward pass."""
    rows = rows_per_expert * experts
    tokens = rows // 2
    hidden = 2 * expert_width if is_gated(activation) else expert_width

    def meta(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def index(size):
        return meta(size, dtype=torch.int32)

    x, w_in, w_out = meta(tokens, width), meta(experts, hidden, width), meta(experts, width, expert_width)
    b_in, b_out = (meta(experts, hidden), meta(experts, width)) if bias else (None, None)
    weight = meta(rows, dtype=torch.float32)
    inputs = (x, w_in, w_out, b_in, b_out, weight, index(rows), index(experts + 1), index(rows), index(tokens + 1))
    with launch.recording() as launches:
        layer = ExpertLayer(*inputs, activation)
        out, z = ops.forward_pass(layer, True)
        ops.backward_pass(layer, out, z, [True, True, True, bias, bias, True])
    return launches


def check(recorded_launch):
    usage = resources.usage(recorded_launch)
    assert usage.spilled == 0, usage
    assert usage.shared_bytes <= resources.SHARED_BYTES, usage
    args = recorded_launch.args
    half = any(getattr(value, "dtype", None) in (torch.bfloat16, torch.float16) for value in args.values())
    if usage.kernel in TENSOR_CORE_KERNELS and half and args["BLOCK_M"] >= 64:
        assert usage.wgmma > 0, usage
        by_descriptor = any(name.endswith("_desc") and value is not None for name, value in args.items())
        gathered = any(args.get(name) is not None for name in ("token", "x_index", "a_index", "b_index"))
        assert (usage.tma_loads > 0) == by_descriptor, usage
        assert usage.async_copies > 0 or not gathered, usage


@pytest.mark.parametrize(
    ("rows_per_expert", "dtype", "width"),
    [
        (2048, torch.bfloat16, 1024),
        (2048, torch.bfloat16, 8192),
        (1, torch.bfloat16, 1024),
        (2048, torch.float32, 1024),
    ],
    ids=str,
)
def test_default_configurations(rows_per_expert, dtype, width):
    """The width decides whether weight gradients are cut into chunks of rows."""
    for each in recorded(rows_per_expert, dtype, width=width, expert_width=width // 2):
        check(each)


def test_routing_tables():
    experts = torch.empty(4096, 8, dtype=torch.int64, device="meta")
    with launch.recording() as launches:
        routing.build_tables(experts, 128, torch.empty(4096, 8, dtype=torch.bool, device="meta"))
    assert len(launches) == 2
    for each in launches:
        check(each)


@pytest.mark.parametrize("experts", [8, 128, 256, 512])
def test_routing_tables_of_a_list(experts):
    token, expert = torch.empty(2, 4096, dtype=torch.int64, device="meta")
    with launch.recording() as launches:
        keep = torch.empty(4096, dtype=torch.bool, device="meta")
        listed_routing.build_tables(token, expert, 1024, experts, keep)
    assert len(launches) == 3
    for each in launches:
        check(each)


def products_in_32_bits(recorded_launch):
    """Products of a runtime size (an integer argument) and something unknown that the kernel computes in 32 bits.

    What a row or an expert is multiplied by is such a size, so with none of these no address wraps at 2^31 elements.
    It says nothing of sums: rows, columns and experts are each below 2^31 by the type of the tables.
    """
    text = resources.compile_launch(recorded_launch).asm["ttir"]
    sizes = set(re.findall(r"%([\w.]+): i32", text[text.index("tt.func") :].split("\n", 1)[0]))
    sizes -= {"rows_per_tile", "rows_per_chunk"}  # their products are numbers of rows
    found = re.findall(r"%([\w.]+) = ([\w.]+) (.*?)(?: : (.*?))?(?: loc\(.*)?$", text, re.MULTILINE)
    values = {name: (operation, re.findall(r"%([\w.]+)", operands)) for name, operation, operands, _ in found}

    def origin(name):
        while name in values and values[name][0] in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi"):
            name = values[name][1][0]
        return name

    def is_known(name):  # to the compiler: a constant, or made of constants and ranges alone
        if name not in values or not values[name][0].startswith(("arith.", "tt.make_range", "tt.splat")):
            return False
        return all(map(is_known, values[name][1]))

    products = []
    for name, operation, operands, kind in found:
        sources = [origin(operand) for operand in re.findall(r"%([\w.]+)", operands)]
        if operation == "arith.muli" and kind.rstrip(">").endswith("i32") and sizes & set(sources):
            products += [] if any(map(is_known, sources)) else [name]
    return products


@triton.jit
def wrapping_kernel(x, out, stride, WIDE: tl.constexpr):
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    if WIDE:
        tl.store(out + row, tl.load(x + row.to(tl.int64) * stride))
    else:
        tl.store(out + row, tl.load(x + row * stride))


def test_a_wrapping_address_is_found():
    x = torch.empty(16, 3, device="meta")
    for wide, products in ((False, 1), (True, 0)):
        args = {"x": x, "out": x, "stride": 3, "WIDE": wide}
        assert len(products_in_32_bits(launch.Launch(wrapping_kernel, args, 4, 1))) == products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_addresses_are_computed_in_64_bits(dtype):
    """So that N x F and E x D x F may pass 2^31. tests/gpu runs such a shape; this only reads the code."""
    launches = recorded(64, dtype, bias=True) + recorded(64, dtype, width=1000, expert_width=500)  # the second: no TMA
    token, expert = torch.empty(2, 4096, dtype=torch.int64, device="meta")
    with launch.recording() as tables:
        routing.build_tables(torch.empty(4096, 8, dtype=torch.int64, device="meta"), 128)
        listed_routing.build_tables(token, expert, 1024, 128)
    kernels = set()
    for each in (*launches, *tables):
        assert products_in_32_bits(each) == [], each.kernel.__name__
        kernels.add(each.kernel.__name__)
    assert kernels >= TENSOR_CORE_KERNELS | {"combine_kernel", "bias_grad_kernel", "place_kernel"}


@pytest.mark.skipif(not ALL, reason="SCATTERFOLD_COMPILE_ALL=1 compiles every configuration")
@pytest.mark.parametrize("problem", list(configs.all_problems()), ids=lambda problem: problem.key())
def test_every_configuration(problem):
    gated = problem.halves == 2
    for config in configs.candidates(problem):
        variants = {config, replace(config, persistent=True)}
        for option in variants:
            with configs.forced({problem.kernel: option}):
                launches = recorded(problem.bucket, problem.dtype, "geglu" if gated else "gelu", bias=True)
            for each in launches:
                if each.args.get("BLOCK_K") == config.block_k and belongs(problem.kernel, each):
                    check(each)


def belongs(kernel, recorded_launch):
    name, args = recorded_launch.kernel.__name__, recorded_launch.args
    return name == f"{kernel}_kernel" or (name == "rows_kernel" and kernel == "rows_k" and args["W_K_ROWS"])


@pytest.mark.skipif(not ALL, reason="SCATTERFOLD_COMPILE_ALL=1 compiles every activation")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_activation(activation, dtype):
    for rows_per_expert in (16, 64, 2048):
        for each in recorded(rows_per_expert, dtype, activation, bias=True):
            check(each)
