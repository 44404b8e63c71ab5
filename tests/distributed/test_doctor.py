"""`scatterfold doctor` among ranks that are there: what it measures, and that a wrong collective is found."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scatterfold.parallel.process import running
from scatterfold.tools.cli import main
from scatterfold.tools.doctor import ranks


def three_ranks(folder):
    folder = Path(folder)
    with running("cpu", timeout_s=120) as process:
        found = ranks.check_ranks(process)
        whole_reduce, whole_exchange = ranks._all_reduce, ranks._all_to_all
        if process.rank == 1:  # the second rank gets back what it gave

            def swallow(tensor):
                whole_reduce(tensor)
                return tensor.clone()

            ranks._all_reduce = swallow
        broken_reduce = ranks.check_ranks(process)["wrong"]
        ranks._all_reduce = whole_reduce
        ranks._all_to_all = lambda tensor: (
            whole_exchange(tensor) if process.rank else torch.zeros_like(whole_exchange(tensor))
        )
        broken_exchange = ranks.check_ranks(process)["wrong"]
        ranks._all_to_all = whole_exchange
        dist.barrier()
    if process.is_main:
        (folder / "found.json").write_text(json.dumps([found, broken_reduce, broken_exchange]))
    assert main(["doctor", f"json={folder / 'doctor.json'}", "disk_mb=0", "device=cpu"]) == 0


@pytest.mark.distributed
def test_ranks_that_are_there(run_ranks, tmp_path):
    run_ranks(3, __file__, "three_ranks", tmp_path)
    found, broken_reduce, broken_exchange = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == [] and found["world"] == 3
    assert [(link["from"], link["to"]) for link in found["links"]] == [(0, 1), (1, 2), (2, 0)]
    assert all(link["gb_per_s"] > 0 for link in found["links"])
    assert len(found["compute_ms"]) == 3 and found["clock_offset_ms"][0] == 0
    assert max(map(abs, found["clock_offset_ms"])) < 5000  # all of them read the same clock
    assert {line.partition(":")[0] for line in broken_reduce} == {"rank 1"}
    assert all("all-reduce" in line for line in broken_reduce) and len(broken_reduce) == len(ranks.SIZES)
    assert {line.partition(":")[0] for line in broken_exchange} == {"rank 0"}
    assert all("all-to-all" in line for line in broken_exchange)
    record = json.loads((tmp_path / "doctor.json").read_text())  # one file, of the first rank, under torchrun
    assert record["passed"] and record["ranks"]["world"] == 3 and record["checks"]


def test_slow_ranks_links_and_clocks_are_named():
    result = {
        "hosts": ["a", "a", "b", "b"],
        "compute_ms": [10.0, 11.0, 10.0, 25.0],
        "links": [{"from": n, "to": (n + 1) % 4, "gb_per_s": speed} for n, speed in enumerate([20, 2, 21, 19])],
        "clock_offset_ms": [0.0, 1.0, 250.0, 3.0],
    }
    compute, link, clock = ranks._slow(result)
    assert compute.startswith("rank 3 on b computes 2.4 times as long")
    assert link.startswith("rank 1 to 2 (a to b) carries 2.00 GB/s")
    assert clock == "the clock of rank 2 on b is +250 ms off that of rank 0"
    result |= {"compute_ms": [10.0] * 4, "links": [], "clock_offset_ms": [0.0] * 4}
    assert ranks._slow(result) == []


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
