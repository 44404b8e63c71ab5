"""Functions that run inside the kernels: activations, and which tile of which expert a program computes."""

# Triton annotates constants as tl.constexpr and takes plain numbers: pyright need not agree.
# pyright: reportArgumentType=false

import triton
import triton.language as tl


@triton.jit
def act(NAME: tl.constexpr, x):
    """silu, gelu (exact), relu, relu2 or clamped_swish of a float32 tensor. NaN stays NaN."""
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "clamped_swish":
        x = tl.where(x > 7.0, 7.0, x)
        y = x * tl.sigmoid(1.702 * x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "relu":
        y = tl.where(x < 0, 0.0, x)
    else:
        y = tl.where(x < 0, 0.0, x * x)
    return y


@triton.jit
def act_grad(NAME: tl.constexpr, x):
    """Derivative of `act`."""
    if NAME == "silu":
        s = tl.sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif NAME == "clamped_swish":
        s = tl.sigmoid(1.702 * x)
        d = tl.where(x > 7.0, 0.0, s * (1.0 + 1.702 * x * (1.0 - s)))
    elif NAME == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "relu":
        d = tl.where(x > 0, 1.0, 0.0)
    else:
        d = tl.where(x > 0, 2.0 * x, 0.0)
    return d


@triton.jit
def factor(NAME: tl.constexpr, up):
    """What the gate's activation is multiplied by: up, which clamped_swish clamps and adds one to. NaN stays NaN."""
    y = up
    if NAME == "clamped_swish":
        y = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
    return y


@triton.jit
def factor_grad(NAME: tl.constexpr, up, grad):
    """`grad`, of the factor, as the gradient of up."""
    y = grad
    if NAME == "clamped_swish":
        y = tl.where((up > 7.0) | (up < -7.0), 0.0, grad)
    return y


@triton.jit
def locate(tile, total, columns, GROUP_M: tl.constexpr):
    """(row tile, column tile) of a linear tile number.

    Programs that run together get neighbouring numbers: groups of GROUP_M row tiles sweep the columns together, so
    that they share the rows and an expert's weights in the L2 cache.
    """
    in_group = GROUP_M * columns
    first = (tile // in_group) * GROUP_M
    size = tl.minimum(total - first, GROUP_M)
    within = tile % in_group
    return first + within % size, within // size


@triton.jit
def halves(acc, HALVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gate and up parts of an accumulator (BLOCK_M, 2 * BLOCK_N); without a gate, the accumulator twice.

    A thread of a wgmma accumulator holds whole rows, so this moves no data.
    """
    if HALVES == 2:
        gate, up = tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))
    else:
        gate = acc
        up = acc
    return gate, up


@triton.jit
def quarters(tile, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    """The four column parts of a tile (BLOCK_M, 4 * COLUMNS)."""
    left, right = halves(tile, 2, BLOCK_M, 2 * COLUMNS)
    first, second = halves(left, 2, BLOCK_M, COLUMNS)
    third, fourth = halves(right, 2, BLOCK_M, COLUMNS)
    return first, second, third, fourth


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. PRECISION is tl.dot's, or "upcast": the interpreter cannot multiply bfloat16."""
    if PRECISION == "upcast":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
