"""Runs as PyTorchJobs of Kubeflow's training operator (v1): one launcher in each pod.

The operator gives each pod torchrun's variables (tools/launchers/machines.py), by which the launchers find each other.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...kernels.errors import ConfigError
from .machines import parse_nodes

NAME = re.compile(r"[a-z](?:[-a-z0-9]*[a-z0-9])?")
QUANTITY = re.compile(r"(?=.*[1-9])\d+(?:\.\d+)?(?:m|k|[KMGTPE]i|[MGTPE])?")
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESOURCE = re.compile(r"[a-z0-9.-]+/[A-Za-z0-9._-]+")
RESTART_POLICIES = ("OnFailure", "Always", "Never", "ExitCode")
LONGEST_NAME = 50  # the operator adds -worker-N, and a label has 63 characters
CONTAINER = "pytorch"  # the operator looks for a container of this name
STOPPED = 143  # a pod that was told to stop and has saved is started again; with 0 the job would count as done


@dataclass(frozen=True)
class Kubernetes:
    """The manifest of a PyTorchJob.

    Attributes:
        image: of the container; it has scatterfold installed.
        claim: CLAIM or CLAIM:MOUNT, a persistent volume claim that all pods can write; run folders are in it.
        nodes: pods, N, or MIN:MAX for an elastic job.
        nproc_per_node: ranks in each: a number, gpu, cpu or auto.
        gpus_per_node, cpus_per_task, mem: of each pod, as Kubernetes counts; None to ask for nothing.
        shm: size of /dev/shm, through which workers of NCCL and of data loaders talk.
        rdma: RESOURCE=N of the cluster's network plugin, such as rdma/hca=1; None for none.
        job_name, namespace: of the job.
        env: NAME=VALUE of each pod.
        secrets: names of secrets whose keys become variables of each pod (WANDB_API_KEY and the like).
        image_pull_secret, service_account: by name.
        node_selector: KEY=VALUE labels of the machines.
        setup: lines of shell before the start.
        python: the interpreter in the image.
        max_restarts: how often ranks are started again after a failure, within their pods.
        backoff_limit: how often pods are started again before the job has failed.
        restart_policy: of the pods.
        signal_seconds: how long a pod that must go has to save.

    Raises: ConfigError for a value that cannot be.
    """

    image: str
    claim: str
    nodes: int | str = 1
    nproc_per_node: int | str = "auto"
    gpus_per_node: int | str | None = None
    cpus_per_task: int | str | None = None
    mem: str | None = None
    shm: str = "16Gi"
    rdma: str | None = None
    job_name: str = "scatterfold"
    namespace: str | None = None
    env: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    image_pull_secret: str | None = None
    service_account: str | None = None
    node_selector: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    python: str = "python"
    max_restarts: int = 3
    backoff_limit: int = 3
    restart_policy: str = "OnFailure"
    signal_seconds: int = 120

    def __post_init__(self) -> None:
        least, most = parse_nodes(self.nodes, "--nnodes")
        if not self.image or any(character.isspace() for character in self.image):
            raise ConfigError(f"--image={self.image!r} is no image, allowed: [REGISTRY/]NAME[:TAG]")
        if len(self.job_name) > LONGEST_NAME or not NAME.fullmatch(self.job_name):
            raise ConfigError(
                f"--job-name={self.job_name} is no name of a PyTorchJob, allowed: a letter, then up to "
                f"{LONGEST_NAME - 1} of a to z, 0 to 9 and -"
            )
        for flag, value in (("--mem", self.mem), ("--shm", self.shm), ("--cpus-per-task", self.cpus_per_task)):
            if value is not None and not QUANTITY.fullmatch(str(value)):
                raise ConfigError(f"{flag}={value} is no quantity of Kubernetes, allowed: such as 8, 500m or 64Gi")
        if self.gpus_per_node is not None and not (str(self.gpus_per_node).isdigit() and int(self.gpus_per_node) > 0):
            raise ConfigError(f"--gpus-per-node={self.gpus_per_node} is no number of GPUs, allowed: 1 or more")
        if self.restart_policy not in RESTART_POLICIES:
            raise ConfigError(
                f"--restart-policy={self.restart_policy} is unknown, allowed: {', '.join(RESTART_POLICIES)}"
            )
        for flag, number in (("--backoff-limit", self.backoff_limit), ("--signal-seconds", self.signal_seconds)):
            if number < 0:
                raise ConfigError(f"{flag}={number} is negative, allowed: 0 or more")
        if least < most and self.max_restarts == 0:
            raise ConfigError(f"--nnodes {self.nodes} with --max-restarts 0, allowed: --max-restarts 1 or more")
        self._pairs("--env", self.env, VARIABLE_NAME)
        self._pairs("--node-selector", self.node_selector, re.compile(r"[A-Za-z0-9./_-]+"))
        if self.rdma is not None:
            ((_, count),) = self._pairs("--rdma", (self.rdma,), RESOURCE).items()
            if not count.isdigit() or int(count) < 1:
                raise ConfigError(f"--rdma={self.rdma} has no number, allowed: RESOURCE=N such as rdma/hca=1")
        if not self.mount.is_absolute():
            raise ConfigError(f"--pvc={self.claim} has no absolute MOUNT, allowed: CLAIM:/PATH")

    @property
    def mount(self) -> PurePosixPath:
        """Where the claim is in each pod."""
        return PurePosixPath(self.claim.partition(":")[2] or "/workspace")

    def manifest(self, words: list[str], run_dir: str | None) -> dict[str, Any]:
        """The PyTorchJob that runs `scatterfold train WORDS`.

        Args:
            run_dir: inside of the claim's mount; None for MOUNT/runs/NAME.

        Raises: ConfigError for a run folder that would be lost with its pod.
        """
        folder = PurePosixPath(run_dir) if run_dir else self.mount / "runs" / self.job_name
        if not folder.is_relative_to(self.mount) or ".." in folder.parts:
            raise ConfigError(f"run_dir={run_dir} is lost with its pod, allowed: a folder in {self.mount} (--pvc)")
        least, most = parse_nodes(self.nodes)
        pod = self._pod([*(word for word in words if not word.startswith("run_dir=")), f"run_dir={folder}"])
        spec: dict[str, Any] = {
            "nprocPerNode": str(self.nproc_per_node),
            "runPolicy": {"backoffLimit": self.backoff_limit, "cleanPodPolicy": "Running"},
        }
        if least < most:
            spec["elasticPolicy"] = {
                "rdzvBackend": "c10d",
                "minReplicas": least,
                "maxReplicas": most,
                "maxRestarts": self.max_restarts,
            }
            spec["pytorchReplicaSpecs"] = {"Worker": self._replicas(most, pod)}
        else:
            spec["pytorchReplicaSpecs"] = {"Master": self._replicas(1, pod)}
            if most > 1:
                spec["pytorchReplicaSpecs"]["Worker"] = self._replicas(most - 1, pod)
        metadata = {"name": self.job_name} | ({"namespace": self.namespace} if self.namespace else {})
        return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": metadata, "spec": spec}

    def text(self, words: list[str], run_dir: str | None) -> str:
        """The manifest as YAML."""
        import yaml

        class Plain(yaml.SafeDumper):
            def ignore_aliases(self, data: Any) -> bool:
                return True  # Master and Worker have the same pod, written out twice

        head = "# Written by scatterfold. Give it to kubectl apply -f; the same job again resumes its run folder."
        return f"{head}\n{yaml.dump(self.manifest(words, run_dir), Dumper=Plain, sort_keys=False, width=110)}"

    def _replicas(self, count: int, pod: dict[str, Any]) -> dict[str, Any]:
        return {"replicas": count, "restartPolicy": self.restart_policy, "template": {"spec": pod}}

    def _pod(self, words: list[str]) -> dict[str, Any]:
        container: dict[str, Any] = {"name": CONTAINER, "image": self.image, "command": self._command(words)}
        variables = self._pairs("--env", self.env, VARIABLE_NAME)
        container["env"] = [
            *({"name": name, "value": value} for name, value in variables.items()),
            # How the other pods reach the ranks of this one, whatever its name resolves to.
            {"name": "PET_LOCAL_ADDR", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        ]
        if self.secrets:
            container["envFrom"] = [{"secretRef": {"name": name}} for name in self.secrets]
        container["resources"] = self._resources()
        container["volumeMounts"] = [
            {"name": "runs", "mountPath": str(self.mount)},
            {"name": "shm", "mountPath": "/dev/shm"},
        ]
        if self.rdma is not None:  # RDMA registers memory, which must stay where it is
            container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
        pod: dict[str, Any] = {"terminationGracePeriodSeconds": self.signal_seconds, "containers": [container]}
        pod["volumes"] = [
            {"name": "runs", "persistentVolumeClaim": {"claimName": self.claim.partition(":")[0]}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shm}},
        ]
        if self.node_selector:
            pod["nodeSelector"] = self._pairs("--node-selector", self.node_selector, re.compile(r"\S+"))
        if self.image_pull_secret is not None:
            pod["imagePullSecrets"] = [{"name": self.image_pull_secret}]
        if self.service_account is not None:
            pod["serviceAccountName"] = self.service_account
        return pod

    def _command(self, words: list[str]) -> list[str]:
        launch = [
            *(self.python, "-m", "scatterfold.tools.launch"),
            *("--nnodes", str(self.nodes), "--nproc-per-node", str(self.nproc_per_node)),
            *("--max-restarts", str(self.max_restarts), "--stopped-code", str(STOPPED)),
            *("train", *words),
        ]
        if not self.setup:
            return launch
        return ["bash", "-c", "\n".join(["set -eo pipefail", *self.setup, f"exec {shlex.join(launch)}"])]

    def _resources(self) -> dict[str, Any]:
        wanted: dict[str, Any] = {}
        if self.gpus_per_node is not None:
            wanted["nvidia.com/gpu"] = str(self.gpus_per_node)
        if self.cpus_per_task is not None:
            wanted["cpu"] = str(self.cpus_per_task)
        if self.mem is not None:
            wanted["memory"] = self.mem
        if self.rdma is not None:
            wanted.update(self._pairs("--rdma", (self.rdma,), RESOURCE))
        return {"requests": dict(wanted), "limits": wanted} if wanted else {}

    def _pairs(self, flag: str, words: tuple[str, ...], key: re.Pattern[str]) -> dict[str, str]:
        found = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or not key.fullmatch(name):
                raise ConfigError(f"{flag}={word} is no pair, allowed: KEY=VALUE")
            found[name] = value
        return found


def setup_lines(given: tuple[str, ...]) -> tuple[str, ...]:
    """Lines of shell; the path of a file of this machine stands for its lines, because the pod does not have it."""
    lines: list[str] = []
    for line in given:
        path = Path(line).expanduser()
        lines += path.read_text().splitlines() if path.is_file() else [line]
    return tuple(lines)
