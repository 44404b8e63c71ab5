"""`scatterfold launch`: several ranks of a command, on this machine or on many."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .close_match import did_you_mean
from .errors import guarded
from .launch_flags import BOTH, HELP, KUBERNETES, SLURM, given, parse_flags

COMMANDS = ("train",)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command_at = next((i for i, word in enumerate(words) if word in COMMANDS), len(words))
    if any(word in ("--help", "-h") for word in words[:command_at]):
        print(HELP)
        return 0
    return guarded(lambda: _run(words, command_at))


def _run(words: list[str], command_at: int) -> int:
    is_script = any(word.partition("=")[0] in ("--slurm", "--kubernetes") for word in words[:command_at])
    flags = parse_flags(words[:command_at], {} if is_script else _variables())
    if command_at == len(words):
        command = flags.command or ""
        raise _error(f"{command or 'no command'!r} cannot be launched{did_you_mean(command, COMMANDS)}, allowed: train")
    if flags.command is not None:
        raise _error(f"{flags.command!r} before {words[command_at]} is no flag, allowed: see scatterfold launch --help")
    overrides = words[command_at + 1 :]
    if any(word in ("--help", "-h") for word in overrides):
        from .train import main as train

        return train(["--help"])
    _check_kinds(flags)
    if flags.slurm:
        return _write_script(flags, overrides)
    if flags.kubernetes:
        return _write_manifest(flags, overrides)
    return _launch(flags, overrides)


def _variables() -> dict[str, str]:
    from .launchers.machines import take_variables

    return take_variables(os.environ)


def _check_kinds(flags: argparse.Namespace) -> None:
    """Every flag must belong to what is started. Raises: ConfigError."""
    if flags.slurm and flags.kubernetes:
        raise _error("--slurm and --kubernetes are two ways to start, allowed: one of them")
    for tables, there, what in (
        ((SLURM,), flags.slurm, "is for a SLURM script, allowed: together with --slurm FILE"),
        ((KUBERNETES,), flags.kubernetes, "is for a PyTorchJob, allowed: together with --kubernetes FILE"),
        ((BOTH,), flags.slurm or flags.kubernetes, "is for a script, allowed: together with --slurm or --kubernetes"),
    ):
        wrong = next(iter(given(flags, *tables)), None)
        if wrong is not None and not there:
            raise _error(f"--{wrong.replace('_', '-')} {what}")
    if flags.slurm or flags.kubernetes:
        for name in ("rdzv_endpoint", "rdzv_conf", "local_addr", "node_rank"):
            if getattr(flags, name) is not None:
                raise _error(f"--{name.replace('_', '-')} is found by the script itself, allowed: without it")


def _launch(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Compose once here, so that bad input is told before any process is started; then start the ranks."""
    from .launchers import Torchrun
    from .run_folder import VARIABLE, run_folder

    launcher = Torchrun(
        nproc_per_node=_number_or_word(flags.nproc_per_node),
        nnodes=_number_or_word(flags.nnodes),
        rdzv_endpoint=flags.rdzv_endpoint,
        max_restarts=flags.max_restarts or 0,
        rdzv_conf=flags.rdzv_conf,
        local_addr=flags.local_addr,
        node_rank=flags.node_rank,
        stopped_code=flags.stopped_code,
    )
    config = _composed(overrides)
    if config is None:
        return 0
    if launcher.machines[1] > 1 and config["run_dir"] is None and VARIABLE not in os.environ:
        raise _error(f"run_dir=null with --nnodes {flags.nnodes}, allowed: run_dir=DIR, the same on every machine")
    _check_elastic(launcher.machines, launcher.nproc_per_node, config)
    with run_folder(config["run_dir"]) as folder:
        return launcher.run(overrides, folder)


def _composed(overrides: list[str]) -> dict[str, Any] | None:
    """The configuration, so that a job does not start only to find a misspelled key; None where it is only shown."""
    from .composition import session
    from .request import Request
    from .train import checked

    request = Request.parse(overrides)
    if request.multirun:
        raise _error("launch … train -m would sweep on every rank, allowed: scatterfold train -m … launcher=torchrun")
    with session(request) as hydra:
        if request.show is not None:
            hydra.show()
            return None
        return checked(hydra.resolve(hydra.compose()), request)


def _check_elastic(machines: tuple[int, int], nproc_per_node: int | str, config: Mapping[str, Any]) -> None:
    """Every number of machines that the run may have must fit its layout and its batch. Raises: ConfigError."""
    least, most = machines
    if least == most:
        return
    from torch.distributed.run import determine_local_world_size

    from ..kernels.errors import ConfigError
    from ..moe.components import check
    from ..moe.data import DataSettings
    from ..moe.data.batches import Share
    from ..parallel.layout import Layout

    nproc = determine_local_world_size(str(nproc_per_node))
    layout, data = check(Layout, config["layout"], "layout"), check(DataSettings, config["data"], "data")
    for count in range(least, most + 1):
        try:
            resolved = layout.resolve(count * nproc)
            Share.of(data.global_batch_size, data.micro_batch_size, 0, resolved.data)
        except ConfigError as error:
            raise _error(f"--nnodes {least}:{most} may run on {count} x {nproc} ranks: {error}") from error


def _write_script(flags: argparse.Namespace, overrides: list[str]) -> int:
    from .launchers import Slurm
    from .launchers.written import check_job, write_checked

    if ":" in flags.nnodes:
        raise _error(f"--nnodes {flags.nnodes} with --slurm: a job keeps its nodes until it ends, allowed: --nnodes N")
    options = given(flags, BOTH, SLURM)
    if "cpus_per_task" in options:
        options["cpus_per_task"] = _whole("--cpus-per-task", options["cpus_per_task"])
    slurm = Slurm(
        nodes=_whole("--nnodes", flags.nnodes),
        nproc_per_node=_number_or_word(flags.nproc_per_node),
        max_restarts=flags.max_restarts or 0,
        **options,
    )
    config = _composed(overrides)
    if config is None:
        return 0
    folder = Path(config["run_dir"]) if config["run_dir"] else None
    said = write_checked(Path(flags.slurm), slurm.script(overrides, folder), check_job)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # the job's log is in it, and SLURM makes no folder
    print(f"{flags.slurm}: submit it with sbatch {flags.slurm} ({said})")
    return 0


def _write_manifest(flags: argparse.Namespace, overrides: list[str]) -> int:
    from .launchers.kubernetes import Kubernetes, setup_lines
    from .launchers.written import check_manifest, write_checked

    for name, what in (("image", "IMAGE, with scatterfold installed"), ("pvc", "CLAIM[:MOUNT], for the run folder")):
        if getattr(flags, name) is None:
            raise _error(f"--kubernetes {flags.kubernetes} without --{name}, allowed: --{name} {what}")
    options = given(flags, BOTH, KUBERNETES)
    options["claim"] = options.pop("pvc")
    options["secrets"] = options.pop("secret", ())
    options["setup"] = setup_lines(options.pop("setup", ()))
    if flags.max_restarts is not None:
        options["max_restarts"] = flags.max_restarts
    job = Kubernetes(
        nodes=_number_or_word(flags.nnodes), nproc_per_node=_number_or_word(flags.nproc_per_node), **options
    )
    config = _composed(overrides)
    if config is None:
        return 0
    if isinstance(job.nproc_per_node, int):
        from .launchers.machines import parse_nodes

        _check_elastic(parse_nodes(job.nodes), job.nproc_per_node, config)
    said = write_checked(Path(flags.kubernetes), job.text(overrides, config["run_dir"]), check_manifest)
    print(f"{flags.kubernetes}: submit it with kubectl apply -f {flags.kubernetes} ({said})")
    return 0


def _number_or_word(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _whole(flag: str, text: str) -> int:
    if not str(text).isdigit():
        raise _error(f"{flag}={text} is no whole number, allowed: 1 or more")
    return int(text)


def _error(message: str) -> Exception:
    from ..kernels.errors import ConfigError

    return ConfigError(message)


if __name__ == "__main__":
    sys.exit(main())
