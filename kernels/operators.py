"""Where our operators are registered: opaque functions of tensors that torch.compile and FSDP call as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._library.custom_ops import CustomOpDef

# Normally "scatterfold". With the repository's folder on the import path, `kernels` can be imported a second time under
# that name: transformers does, looking for a distribution called so. Registering the same names again would destroy the
# operators of the first import while they are in use.
NAMESPACE = __name__.partition(".")[0]


def registered(name: str) -> Callable[[Callable], CustomOpDef]:
    """Make an operator of an annotated function that changes none of its arguments."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())
