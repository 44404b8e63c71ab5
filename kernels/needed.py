"""Which gradients a backward pass is for: a pipeline may ask for those of inputs now and those of weights later."""

from __future__ import annotations

from typing import Any

import torch


def needed_gradients(ctx: Any, count: int) -> list[bool]:
    """Whether this backward pass uses the gradients of the first `count` inputs of an autograd function.

    `ctx.needs_input_grad` tells what could be asked for. It stays True for weights where torch.autograd.grad asks for
    the gradient of an input only, and half of the work would be done for nothing, twice.
    """
    needs = list(ctx.needs_input_grad)
    if torch.compiler.is_compiling():
        return needs[:count]
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # of what needs a gradient, in order
    return [need and _runs(next(nodes)) for need in needs][:count]


def _runs(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient is returned rather than added up, or backward was called by hand
        return True
