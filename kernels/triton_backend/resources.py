"""What a kernel costs on a GPU that need not be here: compile recorded launches for sm_90 and read the machine code.

`usage(launch)` compiles the very kernel, with the very arguments, that the host code launched while
`launch.recording()` was on (meta tensors will do), and reports what decides its speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch

HOPPER = 90
SHARED_BYTES = 227 * 1024  # that one program may use on Hopper

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Usage:
    """Resources of a compiled kernel. `spilled` counts bytes of stack and local memory per thread."""

    kernel: str
    wgmma: int
    async_copies: int
    tma_loads: int
    shared_bytes: int
    registers: int
    spilled: int


def _type(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_constant(kernel: Any, name: str, value: Any) -> bool:
    """Whether a launch compiles this argument in: constexprs, None, and the integer 1."""
    parameter = next(parameter for parameter in kernel.params if parameter.name == name)
    one = type(value) is int and value == 1 and not parameter.do_not_specialize
    return parameter.is_constexpr or value is None or one


def compile_launch(recorded: Launch, capability: int = HOPPER):
    """The compiled kernel of a recorded launch, specialised as the launch would specialise it."""
    kernel = recorded.kernel
    names = [parameter.name for parameter in kernel.params]
    constants = {name: recorded.args[name] for name in names if _is_constant(kernel, name, recorded.args[name])}
    signature = {name: "constexpr" if name in constants else _type(recorded.args[name]) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if isinstance(recorded.args[name], torch.Tensor)
        or (
            type(recorded.args[name]) is int
            and recorded.args[name] % 16 == 0
            and not (name in constants or kernel.params[i].do_not_specialize)
        )
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": recorded.warps, "num_stages": recorded.stages},
        )


def usage(recorded: Launch, capability: int = HOPPER) -> Usage:
    """Compile a recorded launch and count what it uses."""
    compiled = compile_launch(recorded, capability)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = next((Path(backends.__file__).parent / "nvidia" / "bin").glob("cuobjdump*"))
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counted = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Usage(
        kernel=recorded.kernel.__name__,
        wgmma=ptx.count("wgmma.mma_async"),
        async_copies=len(re.findall(r"cp\.async\.c[ag]", ptx)),
        tma_loads=ptx.count("cp.async.bulk.tensor"),
        shared_bytes=compiled.metadata.shared,
        registers=counted["REG"],
        spilled=counted["STACK"] + counted["LOCAL"],
    )
