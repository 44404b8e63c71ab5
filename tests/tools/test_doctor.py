"""`scatterfold doctor`: what it finds, and that it finds what is broken."""

import json
import resource
import shutil
import socket

import pytest
import torch

from scatterfold.kernels import BACKENDS
from scatterfold.tools.doctor import choices, clocks, links, notes

SHAPES = len(choices.SHAPES) * len(choices.DTYPES)


def test_a_sound_machine(scatterfold, tmp_path):
    outcome = scatterfold("doctor", "json=doctor.json", "run_dir=not/there/yet", "disk_mb=2", "ranks=2", "device=cpu")
    assert outcome.code == 0 and not outcome.err
    assert "checks passed" in outcome.out and "FAILED" not in outcome.out
    record = json.loads((tmp_path / "doctor.json").read_text())
    assert record["passed"]
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["versions"]) >= {"python", "triton", "transformers", "megatron-core", "deepspeed", "hydra-core"}
    assert record["cpu"]["threads"] == torch.get_num_threads() and record["cpu"]["name"]
    assert len(record["gpus"]) == torch.cuda.device_count()
    free = shutil.disk_usage(tmp_path).free
    assert abs(record["disk"]["free_bytes"] - free) < 2**30
    on_cpu = [choice for choice in record["backends"] if choice["device"] == "cpu"]
    assert len(on_cpu) == SHAPES and all(choice["why"] for choice in on_cpu)
    checked = {(check["backend"], check["dtype"]) for check in record["checks"] if check["device"] == "cpu"}
    assert checked >= {(backend, dtype) for backend in ("cpu", "torch") for dtype in ("fp32", "bf16", "fp16")}
    assert not (tmp_path / "not").exists()
    assert record["limits"]["open_files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert record["disk"]["write_bytes_per_second"] > 0 and record["temporary"]["read_bytes_per_second"] > 0
    assert {one["name"] for one in record["links"]["interfaces"]} | {"lo"} == {n for _, n in socket.if_nameindex()}
    ranks = record["ranks"]
    assert ranks["world"] == 2 and ranks["wrong"] == [] and "2 ranks agree" in outcome.out
    for name in ("all_reduce", "all_to_all"):
        assert ranks[name]["latency_us"] > 0 and ranks[name]["gb_per_s"] > 0
    assert ranks["hosts"] == [socket.gethostname()] * 2 and ranks["slowest_rank"] in (0, 1)
    assert [(link["from"], link["to"]) for link in ranks["links"]] == [(0, 1)]


def test_each_backend_is_compared_in_output_and_every_gradient(scatterfold, tmp_path):
    scatterfold("doctor", "json=doctor.json", "disk_mb=0")
    checks = json.loads((tmp_path / "doctor.json").read_text())["checks"]
    names = [check["name"] for check in checks if (check["device"], check["backend"]) == ("cpu", "torch")]
    assert len(names) == 3 * 5 and len(set(names)) == 5
    assert all(0 < check["error"] <= check["allowed"] for check in checks)


def test_a_rank_that_fails_is_a_finding(scatterfold, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("rank 1 stopped with exit code 1: no route to host")

    monkeypatch.setattr("scatterfold.tools.bench.ranks.measure_in_ranks", fails)
    outcome = scatterfold("doctor", "ranks=4", "disk_mb=0")
    assert outcome.code == 1 and "no route to host" in outcome.line


TOPOLOGY = """\
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity
GPU0\t X \tNV18\tNV18\tPIX\t0-31
GPU1\tNV18\t X \tSYS\tSYS\t0-31
GPU2\tNV18\tSYS\t X \tSYS\t32-63
NIC0\tPIX\tSYS\tSYS\t X
"""
CLOCKS = (
    "1980, 1980, 35, 120.5, Enabled, 0, 16, 16, 0x0000000000000004\n345, 1980, 91, [N/A], Disabled, 2, 8, 16, 0x48\n"
)
SMI = """#!/usr/bin/env bash
if [ "$1" = topo ]; then printf '%b' "$TOPOLOGY"; exit; fi
case "$1" in *event_reasons*) exit 6;; esac  # an older driver
printf "$CLOCKS"
"""


def test_gpus_by_nvidia_smi(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("TOPOLOGY", TOPOLOGY)
    monkeypatch.setenv("CLOCKS", CLOCKS)
    assert links.gpu_links() == {"NV18": 2, "SYS": 1}
    sound, troubled = clocks.gpu_clocks()
    assert sound == {
        **{"clock_mhz": 1980.0, "max_clock_mhz": 1980.0, "celsius": 35.0, "watts": 120.5, "persistence": True},
        **{"ecc_errors": 0.0, "pcie_width": 16.0, "max_pcie_width": 16.0, "held_down_by": []},
    }
    assert troubled["held_down_by"] == ["hardware slowdown", "hardware thermal limit"] and troubled["watts"] is None
    said = "\n".join(notes.notes(machine(clocks={"gpus": [sound, troubled], "cpu": {"governor": "powersave"}})))
    for words in (
        "GPU 1 is held down by: hardware slowdown",
        "GPU 1 has had 2 memory",
        "8 of 16 PCIe",
        "persistence off",
    ):
        assert words in said
    assert "GPU 0" not in said and "powersave" in said
    smi.write_text("#!/usr/bin/env bash\nexit 9\n")
    assert clocks.gpu_clocks() == [] and links.gpu_links() == {}


def test_ports_of_infiniband(tmp_path, monkeypatch):
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    for name, text in (("state", "4: ACTIVE\n"), ("rate", "400 Gb/sec (4X NDR)\n"), ("link_layer", "InfiniBand\n")):
        (port / name).write_text(text)
    monkeypatch.setattr(links, "INFINIBAND", tmp_path)
    (found,) = links.infiniband()
    assert found == {
        **{"device": "mlx5_0", "port": 1, "state": "ACTIVE", "rate": "400 Gb/sec (4X NDR)", "layer": "InfiniBand"},
    }
    (port / "state").write_text("1: DOWN\n")
    said = notes.notes(machine(links={"infiniband": links.infiniband()}))
    assert "InfiniBand mlx5_0 port 1 is DOWN" in said and any("ulimit -l unlimited" in line for line in said)


def machine(**changes):
    """What `notes` reads of a machine with nothing to say about, but for the changes."""
    sound = {
        "clocks": {"gpus": [], "cpu": {"governor": "performance"}},
        "links": {"infiniband": []},
        "disk": {"run_dir": "runs", "free_bytes": 1e12, "write_bytes_per_second": 1e9},
        "temporary": {"folder": "/tmp", "free_bytes": 1e12},
        "shared_memory_bytes": 64 * 2**30,
        "limits": {"locked_memory_bytes": 65536, "open_files": 65536},
    }
    return {**sound, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"shared_memory_bytes": 64 * 2**20}, "/dev/shm has only 64 MiB"),
        ({"limits": {"locked_memory_bytes": None, "open_files": 1024}}, "only 1024 files may be open"),
        ({"disk": {"run_dir": "r", "free_bytes": 2**30}}, "r has only 1.0 GiB left"),
        ({"disk": {"run_dir": "r", "free_bytes": 1e12, "write_bytes_per_second": 3e6}}, "r takes only 3 MB/s"),
        ({"temporary": {"folder": "/t", "free_bytes": 1e12, "problem": "Permission denied"}}, "/t cannot be written"),
    ],
    ids=str,
)
def test_what_is_worth_a_note(changes, words):
    found = notes.notes(machine(**changes))
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


def scales_the_output(x, *rest, **options):
    return 1.1 * BACKENDS["reference"](x, *rest, **options)


def spoils_one_gradient(x, w_in, w_out, routing, *rest, **options):
    return BACKENDS["reference"](x, w_in.detach() + 0.9 * (w_in - w_in.detach()), w_out, routing, *rest, **options)


def not_a_number(x, *rest, **options):
    return BACKENDS["reference"](x, *rest, **options) * float("nan")


@pytest.mark.parametrize(
    ("broken", "failures"),
    [
        (scales_the_output, {"output", "gradient of x", "gradient of w_in", "gradient of w_out"}),
        (spoils_one_gradient, {"gradient of w_in"}),
        (not_a_number, {"output"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_kernel_that_computes_something_wrong(scatterfold, tmp_path, monkeypatch, broken, failures):
    monkeypatch.setitem(BACKENDS, "torch", broken)
    outcome = scatterfold("doctor", "json=doctor.json", "disk_mb=0")
    assert outcome.code == 1
    assert "checks failed" in outcome.line
    assert "FAILED" in outcome.out
    record = json.loads((tmp_path / "doctor.json").read_text())
    assert not record["passed"]
    failed = {(check["backend"], check["name"]) for check in record["checks"] if not check["passed"]}
    assert failed >= {("torch", name) for name in failures}
    assert {backend for backend, _ in failed} == {"torch"}


def test_a_kernel_that_raises_has_failed(scatterfold, monkeypatch):
    def broken(*inputs, **options):
        raise RuntimeError("illegal\ninstruction")

    monkeypatch.setitem(BACKENDS, "cpu", broken)
    outcome = scatterfold("doctor", "disk_mb=0")
    assert outcome.code == 1
    assert "RuntimeError: illegal instruction" in outcome.out


def test_a_forced_backend_is_shown(scatterfold, tmp_path, monkeypatch):
    monkeypatch.setenv("SCATTERFOLD_BACKEND", "torch")
    outcome = scatterfold("doctor", "json=doctor.json", "disk_mb=0")
    assert outcome.code == 0 and "forced by SCATTERFOLD_BACKEND" in outcome.out
    backends = json.loads((tmp_path / "doctor.json").read_text())["backends"]
    assert {choice["backend"] for choice in backends} == {"torch"}


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (["jsno=x"], None, "jsno=x is unknown (did you mean json?)"),
        (["json=nowhere/x.json"], None, "nowhere/x.json"),
        (["ranks=-1"], None, "ranks=-1 is too small"),
        (["device=tpu"], None, "device=tpu is unknown"),
        ([], "cuda9", "SCATTERFOLD_BACKEND='cuda9' is unknown"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(scatterfold, monkeypatch, words, environment, expected):
    if environment:
        monkeypatch.setenv("SCATTERFOLD_BACKEND", environment)
    outcome = scatterfold("doctor", *words)
    assert outcome.code == 2 and expected in outcome.line


def test_triton_kernels_are_checked_where_its_interpreter_runs_them(spawn, tmp_path):
    pytest.importorskip("triton")
    outcome = spawn(tmp_path, "doctor", "json=doctor.json", TRITON_INTERPRET="1")
    if "only 0-dimensional arrays can be converted" in outcome.out:
        pytest.skip("the interpreter of this triton does not work with this numpy")
    assert outcome.code == 0, outcome.out + outcome.err
    checks = json.loads((tmp_path / "doctor.json").read_text())["checks"]
    assert sum(check["backend"] == "triton" for check in checks) == 3 * 5
