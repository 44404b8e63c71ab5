"""The house rule: an import may only go down, kernels < parallel < moe < tools."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ["kernels", "parallel", "moe", "tools"]
OPTIONAL = ["transformers", "datasets", "deepspeed", "optuna", "submitit", "tensorboard", "pyarrow", "zstandard"]


def imported_modules(path: Path, root: Path) -> set[str]:
    """Every module that a file imports, relative imports resolved to scatterfold.…"""
    package = ["scatterfold", *path.relative_to(root).parts[:-1]]
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            modules.add(".".join(stem))
            modules.update(".".join([*stem, alias.name]) for alias in node.names)
    return modules


def upward_imports(root: Path) -> list[str]:
    found = []
    for height, floor in enumerate(FLOORS):
        above = tuple(f"scatterfold.{name}" for name in FLOORS[height + 1 :])
        for path in sorted((root / floor).rglob("*.py")):
            for module in imported_modules(path, root):
                if any(module == name or module.startswith(name + ".") for name in above):
                    found.append(f"{path.relative_to(root)} imports {module}")
    return found


def test_no_floor_imports_a_higher_one():
    assert upward_imports(ROOT) == []


def test_the_walk_sees_an_upward_import(tmp_path):
    for floor in FLOORS:
        (tmp_path / floor).mkdir()
    (tmp_path / "kernels" / "bad.py").write_text("def f():\n    from ..moe import layer\n")
    (tmp_path / "parallel" / "good.py").write_text("from ..kernels import Routing\n")
    (tmp_path / "moe" / "bad.py").write_text("import scatterfold.tools.cli\n")
    assert {line.split(" ")[0] for line in upward_imports(tmp_path)} == {"kernels/bad.py", "moe/bad.py"}


def test_hydra_is_known_to_the_tools_only():
    users = [
        str(path.relative_to(ROOT))
        for floor in FLOORS[:-1]
        for path in (ROOT / floor).rglob("*.py")
        if any(module.split(".")[0] in ("hydra", "omegaconf") for module in imported_modules(path, ROOT))
    ]
    assert users == []


@pytest.mark.parametrize(
    "statement", ["import scatterfold", "from scatterfold import MoELayer", "import scatterfold.kernels"]
)
def test_import_loads_no_optional_and_no_heavy_package(statement):
    heavy = [*OPTIONAL, "megatron", "wandb", "hydra", "matplotlib", "rich"]
    code = f"{statement}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == "[]"
