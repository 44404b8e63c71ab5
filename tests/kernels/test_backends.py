"""The table of backends: what serves which device, dtype and width."""

import pytest
import torch

from scatterfold.kernels import ConfigError, availability
from scatterfold.kernels.backends import BACKENDS, check_serves, choose_backend
from scatterfold.kernels.native import refusal
from scatterfold.kernels.native.build import BuildError

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.delenv(availability.VARIABLE, raising=False)
    monkeypatch.setattr(availability, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(availability, "HAS_TRITON", True)
    monkeypatch.setattr(availability, "TRITON_IS_PROVEN", True)


def test_cpu_takes_cpp_kernels_for_fine_experts_and_where_it_cannot_multiply_bfloat16(monkeypatch):
    monkeypatch.setattr(refusal, "library", lambda: None)
    for flags, of_bfloat16 in (({"avx2"}, "native"), ({"avx2", "avx512_bf16"}, "cpu"), ({"amx_bf16"}, "cpu")):
        monkeypatch.setattr(refusal, "processor_flags", lambda flags=flags: flags)
        assert choose_backend(CPU, torch.bfloat16, 512, 1024).backend == of_bfloat16
        assert choose_backend(CPU, torch.float32, 512, 1024).backend == "native"
        assert choose_backend(CPU, torch.float32, 512, 2048).backend == "cpu"
        assert choose_backend(CPU, torch.float64, 512, 256).backend == "cpu"


def test_without_a_compiler_one_gemm_per_expert(monkeypatch):
    monkeypatch.setattr(refusal, "library", lambda: BuildError("there is no C++ compiler"))
    choice = choose_backend(CPU, torch.float32, 512, 128)
    assert choice.backend == "cpu" and choice.why == "one GEMM per expert, because there is no C++ compiler"
    with pytest.raises(ConfigError, match="experts.backend='native' cannot run: there is no C"):
        check_serves("native", torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_takes_the_fused_kernels_in_any_width(dtype):
    assert choose_backend(CUDA, dtype, 33, 7).backend == "triton"


def test_float64_on_a_gpu_takes_one_gemm_per_expert():
    choice = choose_backend(CUDA, torch.float64, 512, 256)
    assert choice.backend == "cpu" and "no float64" in choice.why


@pytest.mark.parametrize(("width", "backend"), [(512, "torch"), (33, "cpu")])
def test_without_triton_grouped_mm_where_it_fits(width, backend, monkeypatch):
    monkeypatch.setattr(availability, "HAS_TRITON", False)
    choice = choose_backend(CUDA, torch.bfloat16, width, 256)
    assert choice.backend == backend and "triton is not installed" in choice.why


def test_kernels_that_no_gpu_has_run_are_not_chosen_unasked(monkeypatch):
    monkeypatch.setattr(availability, "TRITON_IS_PROVEN", False)
    choice = choose_backend(CUDA, torch.bfloat16, 512, 256)
    assert choice.backend == "torch" and "experts.backend=triton" in choice.why


def test_old_devices_are_told_why(monkeypatch):
    monkeypatch.setattr(availability, "_capability", lambda device: (7, 5))
    choice = choose_backend(CUDA, torch.float16, 512, 256)
    assert choice.backend == "torch" and "7.5" in choice.why


def test_the_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv(availability.VARIABLE, "reference")
    assert choose_backend(CUDA, torch.bfloat16, 512, 256).backend == "reference"
    monkeypatch.setenv(availability.VARIABLE, "fast")
    with pytest.raises(ConfigError, match="SCATTERFOLD_BACKEND='fast' is unknown, allowed: triton"):
        choose_backend(CUDA, torch.bfloat16, 512, 256)


def test_the_fused_kernels_say_what_they_need():
    check_serves("cpu", torch.zeros(1))
    with pytest.raises(ConfigError, match="experts.backend='triton' cannot run: the Triton kernels need a GPU"):
        check_serves("triton", torch.zeros(1))
    with pytest.raises(ConfigError, match="no float64"):
        check_serves("triton", torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("proven", [True, False])
@pytest.mark.parametrize("forced", [None, "triton", "torch"])
@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_the_device_builds_routing_tables_where_it_runs_the_experts(device, forced, proven, monkeypatch):
    monkeypatch.setattr(availability, "TRITON_IS_PROVEN", proven)
    if forced:
        monkeypatch.setenv(availability.VARIABLE, forced)
    runs_experts = choose_backend(device, torch.bfloat16, 512, 256).backend == "triton"
    can_run = availability.triton_refuses(device) is None
    assert availability.builds_tables(device) == (runs_experts and can_run)


@pytest.mark.parametrize("reason", ["capability", "triton"])
def test_a_device_that_cannot_builds_no_tables(reason, monkeypatch):
    assert availability.builds_tables(CUDA)
    if reason == "triton":
        monkeypatch.setattr(availability, "HAS_TRITON", False)
    else:
        monkeypatch.setattr(availability, "_capability", lambda device: (7, 5))
    assert not availability.builds_tables(CUDA)


def test_what_can_be_chosen_is_in_the_table():
    assert {"triton", "quack", "torch", "native", "cpu", "reference"} == set(BACKENDS)
