"""A collective that one rank never joins: the others end after `communication.timeout_s` and say which it was."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scatterfold.parallel.communication.settings import CommunicationSettings
from scatterfold.parallel.communication.timeouts import CollectiveTimeout, naming_timeouts
from scatterfold.parallel.process import running, sum_over_ranks


def wait_for_ever(group):
    dist.all_reduce(torch.ones(3), group=group)


def one_rank_never_comes(folder):
    folder = Path(folder)
    settings = CommunicationSettings(timeout_s=2.0, flight_recorder=50)
    settings.make_folder(folder)
    with settings.in_environment(folder), running("cpu", settings.meeting_time(30)) as process:
        group = dist.new_group([0, 1])  # torch gives it 30 minutes
        sum_over_ranks(torch.ones(3))
        assert settings.start_counting(30) == 2.0
        if process.rank == 1:
            while not (folder / "done").exists():
                time.sleep(0.05)
            return
        with pytest.raises(ZeroDivisionError), naming_timeouts(process, 2.0, lambda: None):
            raise ZeroDivisionError  # other errors pass
        start = time.monotonic()
        with pytest.raises(CollectiveTimeout) as caught:  # noqa: SIM117
            with naming_timeouts(process, 2.0, lambda: settings.write_record(folder, process.rank)):
                wait_for_ever(group)
        assert time.monotonic() - start >= 1.9
        (folder / "done").write_text(str(caught.value))


@pytest.mark.distributed
def test_it_is_named(run_ranks, tmp_path):
    run_ranks(2, __file__, "one_rank_never_comes", tmp_path)
    message = (tmp_path / "done").read_text()
    assert message.startswith("rank 0 waited 2 s (communication.timeout_s) in all_reduce at distributed/")
    assert message.endswith("(wait_for_ever) and not all other ranks came")
    record = json.loads((tmp_path / "flight_recorder" / "rank-0.json").read_text())
    assert [entry["profiling_name"] for entry in record["entries"]][-2:] == ["gloo:all_reduce"] * 2
    assert record["entries"][-1]["timeout_ms"] == 2000  # the time has reached the group of its own


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
