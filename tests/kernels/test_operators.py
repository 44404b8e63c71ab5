"""Operators survive a second import of the package under its folder's name."""

import subprocess
import sys
from pathlib import Path

import scatterfold

PROGRAM = """
import sys, torch
from scatterfold.kernels import Routing, grouped_mm, moe_mlp
before = torch.ops.scatterfold.moe_mlp_torch.default
sys.path.insert(0, sys.argv[1])
import kernels  # what `import transformers` does if it finds a package of this name
assert kernels.moe_mlp is not moe_mlp
assert torch.ops.scatterfold.moe_mlp_torch.default is before  # else the first import calls what no longer exists
for package in (sys.modules["scatterfold.kernels"], kernels):
    routing = package.Routing.from_topk(torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2), 2)
    for backend in ("cpu", "torch"):
        tensors = [torch.ones(s, requires_grad=True) for s in ((2, 4), (2, 8, 4), (2, 4, 4))]
        package.moe_mlp(*tensors, routing, backend=backend).sum().backward()
        assert all(t.grad.isfinite().all() and t.grad.any() for t in tensors)
    package.grouped_mm(torch.ones(2, 4), torch.ones(2, 8, 4), routing.expert_offsets // 2)
print("ok")
"""


def test_importing_the_folder_by_its_own_name_destroys_nothing():
    root = Path(scatterfold.__file__).parent
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(root)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout == "ok\n", result.stderr[-3000:]
