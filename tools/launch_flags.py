"""The flags of `scatterfold launch`: what each is, and which belong to which way of starting."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

HELP = """Start several ranks of a command (torch.distributed.run), or write a SLURM script or a PyTorchJob that does.

All ranks share one run folder; what each prints is in RUN/logs/rank-N.out and rank-N.err. SIGTERM and Ctrl-C are passed
on, so that the ranks save before they leave; their exit code is the launcher's.

Usage: scatterfold launch [flags] train [overrides]

  --nproc-per-node N    ranks on each machine: a number, gpu, cpu, or auto: one a GPU, or else one a core [auto]
  --nnodes N            machines; the same command must be started on each. MIN:MAX: go on, from the newest
                        checkpoint, when machines leave or join [1]
  --rdzv-endpoint HOST:PORT   where the machines meet: any free port of one of them
  --rdzv-conf KEY=N,…   how long they wait for each other: join_timeout, last_call_timeout, keep_alive_interval, …
  --max-restarts N      start all ranks again, from the last checkpoint, when one fails [0]
  --local-addr ADDRESS  how other machines reach this one [its host name]
  --node-rank N         0 on the machine at the endpoint, where its name does not tell
  --stopped-code N      exit code of a run that a signal stopped and that has saved [0]
  What is not given is read from PET_NNODES, PET_RDZV_ENDPOINT, … as by torchrun, and as a PyTorchJob sets them.

  --slurm FILE          write a batch script, checked with bash -n and, where it is, sbatch --test-only. It takes:
  --partition --account --qos --constraint --time --mem --gpus-per-node --cpus-per-task --job-name --signal-seconds
  --requeue             wait in the queue again after a preemption or the end of the time, and go on
  --array SPEC          several jobs, each in RUN/array-N; 1-10%1: one run in ten jobs, one after the other
  --setup LINE|FILE     shell before the start, such as 'module load cuda'; may be given several times
  --container-image --container-mounts   of pyxis/enroot
  --python PATH         the interpreter on the nodes
  --sbatch NAME=VALUE   any other option of sbatch; may be given several times

  --kubernetes FILE     write the manifest of a PyTorchJob (Kubeflow training operator v1) to FILE. It takes:
  --image IMAGE         with scatterfold installed
  --pvc CLAIM[:MOUNT]   the volume of the run folder, which all pods can write [MOUNT: /workspace]
  --shm SIZE            of /dev/shm [16Gi]
  --rdma RESOURCE=N     such as rdma/hca=1
  --env NAME=VALUE, --secret NAME, --node-selector KEY=VALUE   may be given several times
  --namespace --service-account --image-pull-secret --backoff-limit --restart-policy, and of those above --job-name
  --mem --gpus-per-node --cpus-per-task --signal-seconds --setup --python

Example:
  scatterfold launch --nproc-per-node 8 train experiment=demo layout.dp_shard=8
  scatterfold launch --slurm job.sh --nnodes 2 --nproc-per-node 8 --gpus-per-node 8 --time 4:00:00 train model=small
  scatterfold launch --kubernetes job.yaml --image IMAGE --pvc runs --nnodes 2 --gpus-per-node 8 train model=small"""

# Flags of both scripts, of SLURM's and of Kubernetes', with the type of their value.
BOTH: Mapping[str, type] = {
    **{"mem": str, "gpus_per_node": str, "cpus_per_task": str, "job_name": str, "signal_seconds": int},
    **{"setup": list, "python": str},
}
SLURM: Mapping[str, type] = {
    **{"partition": str, "account": str, "qos": str, "constraint": str, "time": str},
    **{"requeue": bool, "array": str, "container_image": str, "container_mounts": str, "sbatch": list},
}
KUBERNETES: Mapping[str, type] = {
    **{"image": str, "pvc": str, "shm": str, "rdma": str, "env": list, "secret": list, "node_selector": list},
    **{"namespace": str, "service_account": str, "image_pull_secret": str, "backoff_limit": int, "restart_policy": str},
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from ..kernels.errors import ConfigError

        raise ConfigError(f"{message}, allowed: see scatterfold launch --help")


def parse_flags(words: list[str], defaults: Mapping[str, str]) -> argparse.Namespace:
    """Read the flags; `defaults` are what the environment gives, as text. Raises: ConfigError."""
    parser = _Parser(prog="scatterfold launch", add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc-per-node", default="auto")
    parser.add_argument("--nnodes", default="1")
    parser.add_argument("--rdzv-endpoint")
    parser.add_argument("--rdzv-conf")
    parser.add_argument("--max-restarts", type=int)
    parser.add_argument("--local-addr")
    parser.add_argument("--node-rank", type=int)
    parser.add_argument("--stopped-code", type=int, default=0)
    parser.add_argument("--slurm")
    parser.add_argument("--kubernetes")
    for name, kind in {**BOTH, **SLURM, **KUBERNETES}.items():
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=None)
        elif kind is list:
            parser.add_argument(flag, action="append")
        else:
            parser.add_argument(flag, type=kind)
    parser.add_argument("command", nargs="?")
    parser.set_defaults(**defaults)
    return parser.parse_args(words)


def given(flags: argparse.Namespace, *tables: Mapping[str, type]) -> dict[str, Any]:
    """The flags of these tables that the user gave, lists as tuples."""
    values = {name: getattr(flags, name) for table in tables for name in table}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not None}
