"""Choosing, tuning and caching of configurations, and the self-check; run by test_interpreter.py."""

import json
from dataclasses import replace

import pytest
import torch

from scatterfold.kernels.triton_backend import configs, ops
from scatterfold.kernels.triton_backend.configs import Config, Problem
from scatterfold.kernels.triton_backend.self_check import self_check

META = torch.device("meta")
PROBLEM = Problem("up", torch.bfloat16, 16384, 8, 1024, 2048, 2)


def test_a_changing_number_of_rows_keeps_its_bucket_and_key():
    assert {replace(PROBLEM, rows=rows).key() for rows in range(8200, 16384, 700)} == {PROBLEM.key()}
    assert replace(PROBLEM, rows=20000).key() != PROBLEM.key()
    assert replace(PROBLEM, rows=1).bucket == 16 and replace(PROBLEM, rows=10**7).bucket == 8192


def test_the_shipped_default_is_the_first_candidate_unless_forced():
    assert configs.choose(PROBLEM, META) == configs.candidates(PROBLEM)[0]
    other = Config(64, 64, 64)
    with configs.forced({"up": other}):
        assert configs.choose(PROBLEM, META) == other
    assert configs.choose(PROBLEM, META) != other


def test_a_device_without_tma_gets_a_narrow_accumulator(monkeypatch):
    monkeypatch.setattr(configs, "has_tma", lambda device: False)
    config = configs.choose(PROBLEM, META)
    assert config.block_m * config.block_n * PROBLEM.halves <= 128 * 128


def test_every_problem_has_candidates():
    assert all(configs.candidates(problem) for problem in configs.all_problems())


def test_the_cache_survives_other_writers_and_damage(tmp_path):
    path = tmp_path / "folder" / "cache.json"
    assert configs.read_cache(path) == {}
    configs.write_cache(path, {"a": Config(16, 16, 16)})
    configs.write_cache(path, {"b": Config(32, 16, 16, parts=2)})
    assert configs.read_cache(path) == {"a": Config(16, 16, 16), "b": Config(32, 16, 16, parts=2)}
    assert [p.name for p in path.parent.iterdir()] == ["cache.json"]
    path.write_text(json.dumps({"a": {"tile": 3}}))
    assert configs.read_cache(path) == {}
    path.write_text("{")
    assert configs.read_cache(path) == {}


def test_tuning_takes_the_fastest_and_remembers_it(tmp_path, monkeypatch):
    device = torch.device("cuda", 0)
    seconds = {config: 5.0 for config in configs.candidates(PROBLEM)}
    best = configs.candidates(PROBLEM)[2]
    seconds[best] = 1.0
    seconds[replace(best, persistent=True)] = 0.5
    monkeypatch.setenv("SCATTERFOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("SCATTERFOLD_AUTOTUNE", "1")
    monkeypatch.setattr(configs.triton.testing, "do_bench", lambda run, rep: run() or seconds.get(ran[-1], 9.0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A device")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    configs._tuned.cache_clear(), configs.has_tma.cache_clear()
    ran = []
    configs.run(PROBLEM, device, ran.append)
    assert ran[-1] == replace(best, persistent=True)
    trials = len(ran)
    configs.run(replace(PROBLEM, rows=PROBLEM.rows - 100), device, ran.append)
    assert len(ran) == trials + 1 and ran[-1] == replace(best, persistent=True)
    configs._tuned.cache_clear()  # another process: reads the file
    monkeypatch.delenv("SCATTERFOLD_AUTOTUNE")
    configs.run(PROBLEM, device, ran.append)
    assert len(ran) == trials + 2 and ran[-1] == replace(best, persistent=True)
    configs._tuned.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_self_check_passes_and_can_fail(dtype, monkeypatch):
    small = {"tokens": 9, "width": 16, "expert_width": 16, "experts": 2}
    checks = self_check(torch.device("cpu"), dtype, **small)
    assert len(checks) == 5 and all(check.passed for check in checks), checks
    sound = ops.launch.sum_by_token

    def broken(y, weight, assignment, token_offsets, out):
        sound(y, None, assignment, token_offsets, out)

    monkeypatch.setattr(ops.launch, "sum_by_token", broken)
    assert not self_check(torch.device("cpu"), dtype, **small)[0].passed
