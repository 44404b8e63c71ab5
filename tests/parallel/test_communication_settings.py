"""The settings of NCCL and gloo: what they set, and what contradicts them."""

import os
import socket

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.parallel.communication.settings import CommunicationSettings

INTERFACE = socket.if_nameindex()[0][1]
ALL = {
    "NCCL_SOCKET_IFNAME": INTERFACE,
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "NCCL_DEBUG": "INFO",
    "NCCL_DEBUG_SUBSYS": "INIT,NET",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    "TORCH_FR_BUFFER_SIZE": "500",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "500",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
DUMPS = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in (*ALL, *DUMPS):
        monkeypatch.delenv(name, raising=False)


def test_nothing_is_set_by_default(tmp_path):
    before = dict(os.environ)
    with CommunicationSettings().in_environment(tmp_path):
        assert dict(os.environ) == before


def test_every_setting_is_in_the_environment_while_it_counts(tmp_path):
    settings = CommunicationSettings(
        interface=INTERFACE,
        nccl_debug="info",
        nccl_debug_subsystems="INIT,NET",
        nccl_errors="clean_up",
        flight_recorder=500,
    )
    before = dict(os.environ)
    with settings.in_environment(tmp_path):
        added = {name: value for name, value in os.environ.items() if name not in before}
    assert added == ALL | {name: f"{tmp_path}/flight_recorder/nccl-rank-" for name in DUMPS}
    assert dict(os.environ) == before
    settings.make_folder(tmp_path)
    assert (tmp_path / "flight_recorder").is_dir()


def test_the_users_variables_stay_and_a_contradiction_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "/elsewhere/rank-")
    with CommunicationSettings(nccl_debug="warn", flight_recorder=5).in_environment(tmp_path):
        assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "/elsewhere/rank-"
    assert os.environ["NCCL_DEBUG"] == "WARN"
    with pytest.raises(ConfigError, match=r"nccl_debug=info, but the environment has NCCL_DEBUG=WARN, allowed: "):
        CommunicationSettings(nccl_debug="info").check(tmp_path)


def test_what_torchrun_sets_for_its_ranks_is_not_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    settings = CommunicationSettings(nccl_errors="clean_up")
    with pytest.raises(ConfigError, match="the environment has TORCH_NCCL_ASYNC_ERROR_HANDLING=1"):
        settings.check(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    with settings.in_environment(tmp_path):
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timeout_s": 0}, "communication.timeout_s=0 is out of range, allowed: null, above 0"),
        ({"nccl_debug": "loud"}, "communication.nccl_debug='loud' is unknown, allowed: null, version, warn"),
        ({"nccl_errors": "abort"}, "communication.nccl_errors='abort' is unknown, allowed: null, ignore"),
        ({"flight_recorder": -1}, "communication.flight_recorder=-1 is too small"),
        ({"interface": "ib99"}, f"interface=ib99 is no network interface of this machine, allowed: null, {INTERFACE}"),
    ],
    ids=str,
)
def test_refusals(tmp_path, given, message):
    with pytest.raises(ConfigError) as caught:
        CommunicationSettings(**given).check(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_times():
    assert CommunicationSettings().waiting_time(1800) == 2100  # the watchdog speaks first
    assert CommunicationSettings(timeout_s=5).waiting_time(1800) == 5
    assert CommunicationSettings(timeout_s=5).meeting_time(15) == 600  # machines need not start at the same time
    assert CommunicationSettings(timeout_s=5000).meeting_time(15) == 5000
