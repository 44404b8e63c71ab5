"""Flags of `scatterfold launch`: what they may be, and what the environment says in their place."""

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.tools.launchers.machines import parse_endpoint, parse_nodes, parse_rendezvous, take_variables

KUBERNETES = ["--kubernetes", "job", "--image", "sf", "--pvc", "c"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--kubernetes", "job", "--pvc", "c"], "without --image"),
        (["--kubernetes", "job", "--image", "sf"], "without --pvc"),
        ([*KUBERNETES, "--job-name", "Upper"], "--job-name=Upper is no name of a PyTorchJob"),
        ([*KUBERNETES, "--job-name", "a" * 51], "is no name of a PyTorchJob"),
        ([*KUBERNETES, "--shm", "16 GB"], "--shm=16 GB is no quantity of Kubernetes"),
        ([*KUBERNETES, "--mem", "0"], "--mem=0 is no quantity"),
        ([*KUBERNETES, "--gpus-per-node", "h100:8"], "--gpus-per-node=h100:8 is no number of GPUs"),
        ([*KUBERNETES, "--rdma", "rdma/hca"], "--rdma=rdma/hca is no pair"),
        ([*KUBERNETES, "--rdma", "rdma/hca=all"], "--rdma=rdma/hca=all has no number"),
        ([*KUBERNETES, "--env", "1A=x"], "--env=1A=x is no pair"),
        ([*KUBERNETES, "--restart-policy", "Sometimes"], "--restart-policy=Sometimes is unknown"),
        ([*KUBERNETES, "--pvc", "c:relative"], "has no absolute MOUNT"),
        ([*KUBERNETES, "--nnodes", "4:2"], "--nnodes=4:2 has a MIN above its MAX"),
        ([*KUBERNETES, "--nnodes", "1:2", "--max-restarts", "0"], "--max-restarts 1 or more"),
        ([*KUBERNETES, "--nnodes", "1:3", "--nproc-per-node", "1"], "--nnodes 1:3 may run on 3 x 1 ranks"),
        ([*KUBERNETES, "--rdzv-endpoint", "a:1"], "--rdzv-endpoint is found by the script itself"),
        ([*KUBERNETES, "--partition", "gpu"], "--partition is for a SLURM script"),
        (["--slurm", "job", "--image", "sf"], "--image is for a PyTorchJob"),
        (["--slurm", "job", "--kubernetes", "job"], "are two ways to start"),
        (["--image", "sf"], "--image is for a PyTorchJob"),
        (["--mem", "4G"], "--mem is for a script"),
        (["--slurm", "job", "--time", "soon"], "launcher.time=soon is nothing that sbatch takes"),
        (["--slurm", "job", "--mem", "4Gi"], "launcher.mem=4Gi is nothing that sbatch takes"),
        (["--slurm", "job", "--array", "a-b"], "launcher.array=a-b is nothing"),
        (["--slurm", "job", "--nnodes", "1:2"], "a job keeps its nodes until it ends"),
        (["--slurm", "job", "--sbatch", "ntasks-per-node=8"], "is set by the script itself"),
        (["--slurm", "job", "--partition", "a\nb"], "has several lines"),
        (["--slurm", "job", "--container-mounts", "/a:/a"], "without a container"),
        (["--slurm", "job", "--setup", "if true"], "bash -n refuses the script"),
        (["--slurm", "nowhere/job"], "nowhere is no folder"),
        (["--nnodes", "1:2", "--rdzv-endpoint", "h:1"], "would end with the first machine that leaves"),
        (["--nnodes", "2", "--rdzv-endpoint", "h"], "rdzv_endpoint=h is no place to meet"),
        (["--nnodes", "many"], "nnodes=many is no number of machines"),
        (["--rdzv-conf", "last_call=3"], "unknown key 'last_call' (did you mean last_call_timeout?)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(scatterfold, tiny, tmp_path, flags, expected):
    outcome = scatterfold("launch", *flags, "train", *tiny)
    assert outcome.code == 2 and expected in outcome.line
    assert not list(tmp_path.iterdir())


def test_variables_of_torchrun_and_of_a_pod():
    pod = {
        **{"MASTER_ADDR": "moe-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "16", "RANK": "1"},
        **{"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1", "HOME": "/root"},
    }
    flags = take_variables(pod)
    assert flags == {"nnodes": "2", "nproc_per_node": "8", "node_rank": "1", "rdzv_endpoint": "moe-master-0:23456"}
    assert pod.keys() == {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "HOME"}  # the launcher is no rank
    elastic = {"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "moe-worker-0:23456", "PET_MAX_RESTARTS": "3"}
    assert take_variables(elastic) == {
        **{"nnodes": "1:4", "rdzv_endpoint": "moe-worker-0:23456", "max_restarts": "3"},
    }
    assert take_variables({"LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1", "RANK": "0"}) == {}


def test_numbers_of_machines_and_times_to_wait():
    assert parse_nodes(3) == (3, 3) and parse_nodes("2:8") == (2, 8)
    assert parse_endpoint("[::1]:29400") == "[::1]:29400"
    assert parse_rendezvous("join_timeout=60, last_call_timeout=5") == {"join_timeout": 60, "last_call_timeout": 5}
    for call in (
        lambda: parse_nodes("0"),
        lambda: parse_endpoint("h:70000"),
        lambda: parse_rendezvous("read_timeout=x"),
    ):
        with pytest.raises(ConfigError, match="allowed: "):
            call()
