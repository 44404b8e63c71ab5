"""Batch scripts and manifests are asked about before they get their name: by the shell, by SLURM, by Kubernetes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from ...kernels.errors import ConfigError
from ..files import check_target, write_atomically

SECONDS = 30.0  # a controller that is not reachable must not keep the file back
# What kubectl says about the file, not about the way to its cluster.
OF_THE_FILE = ("error validating", "is invalid", "unknown field", "cannot be handled", "error parsing")


def write_checked(path: Path, text: str, check: Callable[[Path], str]) -> str:
    """Write `text` to `path` if `check` finds nothing wrong with it; returns what it says.

    Raises: ConfigError for what `check` finds, or if the file cannot be written.
    """
    check_target(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        write_atomically(draft, text)
        said = check(draft)
    finally:
        draft.unlink(missing_ok=True)
    write_atomically(path, text)
    return said


def check_job(script: Path) -> str:
    """Let bash parse a batch script, and SLURM try it where it is here. Raises: ConfigError with their words."""
    said = ["checked with bash -n"]
    _, refusal = _ask("bash", "-n", str(script))
    if refusal is not None:
        raise ConfigError(f"bash -n refuses the script: {refusal}, allowed: shell in --setup")
    if shutil.which("sbatch"):
        answer, refusal = _ask("sbatch", "--test-only", str(script))
        if refusal is not None:
            raise ConfigError(f"sbatch --test-only refuses the script: {refusal}, allowed: what this cluster offers")
        said.append(f"sbatch --test-only: {answer}" if answer else "sbatch --test-only")
    return ", ".join(said)


def check_manifest(manifest: Path) -> str:
    """Let kubectl look at a manifest where it is here and has a cluster. Raises: ConfigError with its words."""
    if not shutil.which("kubectl"):
        return "not tried: no kubectl here"
    answer, refusal = _ask("kubectl", "apply", "--dry-run=client", "--request-timeout=10s", "-f", str(manifest))
    if refusal is None:
        return f"kubectl apply --dry-run=client: {answer}"
    if "no matches for kind" in refusal:
        return "not tried: the cluster of kubectl has no training operator"
    if "failed to download openapi" not in refusal and any(words in refusal for words in OF_THE_FILE):
        raise ConfigError(f"kubectl refuses the manifest: {refusal}, allowed: what this cluster offers")
    return "not tried: kubectl reaches no cluster"


def _ask(*command: str) -> tuple[str, str | None]:
    """The last line of an answer, and of a refusal if the command ends with an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS:g} s", None
    lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return last, None if done.returncode == 0 else last or f"exit code {done.returncode}"
