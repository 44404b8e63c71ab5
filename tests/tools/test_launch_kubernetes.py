"""The PyTorchJob that `scatterfold launch --kubernetes` writes."""

import sys

import pytest
import yaml

# The part of the PyTorchJob schema (kubeflow.org/v1, training operator 1.9) and of a pod's (core/v1) that is in use:
# a type, {key: schema} with `!` at required keys, [schema] for lists, {"*": schema} for maps of any key.
POD = {
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {"*": str},
    "serviceAccountName": str,
    "imagePullSecrets": [{"name": str}],
    "volumes": [
        {
            "name!": str,
            "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
            "emptyDir": {"medium": str, "sizeLimit": str},
        }
    ],
    "containers!": [
        {
            "name!": str,
            "image": str,
            "command": [str],
            "args": [str],
            "env": [{"name!": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath!": str}}}],
            "envFrom": [{"secretRef": {"name": str}}],
            "resources": {"limits": {"*": str}, "requests": {"*": str}},
            "volumeMounts": [{"name!": str, "mountPath!": str}],
            "securityContext": {"capabilities": {"add": [str], "drop": [str]}},
        }
    ],
}
REPLICAS = {"replicas": int, "restartPolicy": str, "template": {"metadata": {"*": str}, "spec": POD}}
PYTORCHJOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name!": str, "namespace": str},
    "spec": {
        "nprocPerNode": str,
        "runPolicy": {
            "backoffLimit": int,
            "cleanPodPolicy": str,
            "activeDeadlineSeconds": int,
            "ttlSecondsAfterFinished": int,
        },
        "elasticPolicy": {"rdzvBackend": str, "minReplicas": int, "maxReplicas": int, "maxRestarts": int},
        "pytorchReplicaSpecs!": {"Master": REPLICAS, "Worker": REPLICAS},
    },
}


def check_schema(value, schema, where="job"):
    if isinstance(schema, type):
        assert type(value) is schema, f"{where} is {value!r}"
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for number, item in enumerate(value):
            check_schema(item, schema[0], f"{where}[{number}]")
    else:
        assert isinstance(value, dict), where
        known = {key.rstrip("!"): inner for key, inner in schema.items()}
        for key, inner in value.items():
            assert key in known or "*" in known, f"{where}.{key} is unknown"
            check_schema(inner, known.get(key, known.get("*")), f"{where}.{key}")
        missing = [key for key in schema if key.endswith("!") and key.rstrip("!") not in value]
        assert not missing, f"{where} has no {missing}"


def test_the_schema_finds_what_is_wrong():
    sound = {"metadata": {"name": "a"}, "spec": {"pytorchReplicaSpecs": {}}}
    check_schema(sound, PYTORCHJOB)
    for broken in (
        {**sound, "metadata": {}},
        {**sound, "spec": {"pytorchReplicaSpecs": {}, "replicas": 1}},
        {**sound, "spec": {"pytorchReplicaSpecs": {"Worker": {"replicas": "2"}}}},
    ):
        with pytest.raises(AssertionError):
            check_schema(broken, PYTORCHJOB)


@pytest.fixture
def manifest(scatterfold, tiny, tmp_path):
    """`manifest(flags…, train=[overrides…])`: the PyTorchJob that is written."""

    def write(*flags, train=()):
        outcome = scatterfold("launch", "--kubernetes", "job.yaml", *flags, "train", *tiny, *train)
        assert outcome.code == 0, outcome.err
        job = yaml.safe_load((tmp_path / "job.yaml").read_text())
        check_schema(job, PYTORCHJOB)
        assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
        return job

    return write


def test_a_job_of_several_machines(manifest):
    given = ["--image", "sf:1", "--pvc", "runs", "--nnodes", 3, "--nproc-per-node", 8, "--gpus-per-node", 8]
    more = ["--mem", "512Gi", "--rdma", "rdma/hca=2", "--env", "NCCL_DEBUG=WARN", "--secret", "wandb"]
    job = manifest(*given, *more, "--backoff-limit", 5, "--job-name", "moe", train=["seed=3"])
    spec = job["spec"]
    assert job["metadata"] == {"name": "moe"}
    assert spec["nprocPerNode"] == "8" and spec["runPolicy"]["backoffLimit"] == 5 and "elasticPolicy" not in spec
    replicas = spec["pytorchReplicaSpecs"]
    assert {kind: one["replicas"] for kind, one in replicas.items()} == {"Master": 1, "Worker": 2}
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    assert {one["restartPolicy"] for one in replicas.values()} == {"OnFailure"}
    pod = replicas["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for it
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "512Gi", "rdma/hca": "2"}
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    words = container["command"]
    assert words[:3] == ["python", "-m", "scatterfold.tools.launch"]
    assert words[-2:] == ["seed=3", "run_dir=/workspace/runs/moe"]
    assert pod["volumes"] == [
        {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
    ]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/workspace", "/dev/shm"]


def test_one_machine_and_an_elastic_job(manifest, tmp_path):
    assert list(manifest("--image", "sf", "--pvc", "runs")["spec"]["pytorchReplicaSpecs"]) == ["Master"]
    (tmp_path / "env.sh").write_text("export A=1\n")
    elastic = [
        "--nnodes",
        "2:4",
        "--nproc-per-node",
        1,
        "--max-restarts",
        9,
        "--setup",
        "env.sh",
        "--setup",
        "echo it's",
    ]
    job = manifest(
        "--image", "sf", "--pvc", "c:/data", *elastic, train=["run_dir=/data/r", "data.global_batch_size=12"]
    )
    assert job["spec"]["elasticPolicy"] == {
        "rdzvBackend": "c10d",
        "minReplicas": 2,
        "maxReplicas": 4,
        "maxRestarts": 9,
    }
    assert {kind: one["replicas"] for kind, one in job["spec"]["pytorchReplicaSpecs"].items()} == {"Worker": 4}
    command = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["command"]
    assert command[:2] == ["bash", "-c"]
    assert command[2].splitlines()[:3] == ["set -eo pipefail", "export A=1", "echo it's"]
    assert command[2].splitlines()[-1].startswith("exec python -m scatterfold.tools.launch --nnodes 2:4 ")
    assert command[2].endswith(" run_dir=/data/r") and command[2].count("run_dir=") == 1


KUBERNETES = ["--kubernetes", "job", "--image", "sf", "--pvc", "c"]


def test_a_run_folder_outside_of_the_volume(scatterfold, tiny):
    outcome = scatterfold("launch", *KUBERNETES, "train", *tiny, "run_dir=/tmp/run")
    assert outcome.code == 2 and "run_dir=/tmp/run is lost with its pod" in outcome.line


def test_kubectl_is_asked_where_it_has_a_cluster(scatterfold, tiny, tmp_path, monkeypatch):
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    monkeypatch.setenv("PATH", f"{kubectl.parent}:/usr/bin:/bin")

    def answers(words, code):
        kubectl.write_text(f'#!/usr/bin/env bash\necho "{words}"; exit {code}\n')
        kubectl.chmod(0o755)
        return scatterfold("launch", *KUBERNETES, "train", *tiny)

    assert "--dry-run=client: pytorchjob.kubeflow.org/x created" in answers("pytorchjob.kubeflow.org/x created", 0).out
    assert "reaches no cluster" in answers("dial tcp 127.0.0.1:8080: connection refused", 1).out
    assert "has no training operator" in answers("no matches for kind PyTorchJob", 1).out
    (tmp_path / "job").unlink()
    refused = answers("error validating data: unknown field spec.x", 1)
    assert refused.code == 2 and "kubectl refuses the manifest" in refused.line and not (tmp_path / "job").exists()


def test_the_python_of_the_nodes(manifest):
    job = manifest("--image", "sf", "--pvc", "c", "--python", sys.executable)
    assert (
        job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["command"][0]
        == sys.executable
    )
