"""The distribution `scatterfold`: the repository root is the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text()).group(1)
PACKAGES = find_packages(str(ROOT), include=["kernels*", "parallel*", "moe*", "tools*"], exclude=["tools.hydra_path*"])

DEEPSPEED = ["deepspeed>=0.19.8"]  # parallel/engines/deepspeed is written against it; its build needs no compiler
HF = ["transformers>=5.0", "datasets>=3.0"]
# The sweeper asks for a pre-release of Hydra (">=1.1.0.dev7"), so without an upper bound pip takes Hydra 1.4rc, which
# it does not fit; its optuna 2.10 cannot migrate a database through SQLAlchemy 2.
SWEEP = [
    "hydra-core<1.4",
    "hydra-optuna-sweeper>=1.3,<1.4",
    "sqlalchemy<2",
    "hydra-submitit-launcher>=1.2,<1.4",
]
TENSORBOARD = ["tensorboard>=2.15"]
QUACK = ["quack-kernels>=0.6.5,<0.7"]  # kernels/quack_backend.py is written against 0.6.5
DATA = ["pyarrow>=15", "zstandard>=0.22"]
DEV = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "pyright>=1.1",
    "pre-commit>=3",
    "build>=1",
]

setup(
    name="scatterfold",
    version=VERSION,
    description="Mixture-of-Experts training: scatter kernels, folded parallelism, one command",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"scatterfold": "."},
    packages=["scatterfold", *(f"scatterfold.{package}" for package in PACKAGES)],
    package_data={
        "scatterfold": ["configs/*.yaml", "configs/*/*.yaml", "tools/hydra_path/hydra_plugins/*/*.py", "LICENSE"],
        "scatterfold.kernels.native": ["*.cpp", "*.hpp"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "hydra-core>=1.3.2,<1.5",
        "omegaconf>=2.3",
        "megatron-core>=0.16",
        "numpy>=1.26",
        "safetensors>=0.5",
        "tokenizers>=0.20",
        "rich>=13",
        "wandb>=0.19",
        "matplotlib>=3.8",
    ],
    extras_require={
        "deepspeed": DEEPSPEED,
        "hf": HF,
        "sweep": SWEEP,
        "tensorboard": TENSORBOARD,
        "data": DATA,
        "quack": QUACK,
        "dev": [*DEV, *DEEPSPEED, *HF[:1], *TENSORBOARD, *DATA, *SWEEP],
        "all": [*DEEPSPEED, *HF, *SWEEP, *TENSORBOARD, *DATA],
    },
    entry_points={"console_scripts": ["scatterfold=scatterfold.tools.cli:main"]},
)
