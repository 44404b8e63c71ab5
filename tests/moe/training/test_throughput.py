import pytest
import torch

from scatterfold.moe.training.throughput import Meter, device_peak, peak_flops


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_found_by_the_device_name(name, peak):
    assert peak_flops(name) == peak


def test_a_cpu_has_no_known_peak():
    assert device_peak(torch.device("cpu")) is None


def test_speed_counts_steps_and_leaves_pauses_out():
    clock = Clock()
    meter = Meter(flops_per_token=2e9, devices=2, peak=1e12, clock=clock)
    clock.now = 50.0
    assert meter.step(1000)["tokens_per_second"] == 20.0  # the first step warms up and is forgotten with the second
    clock.now = 52.0
    first = meter.step(1000)
    assert first["tokens_per_second"] == 500.0
    assert first["step_seconds"] == 2.0
    clock.now = 100.0  # an evaluation
    meter.pause()
    clock.now = 101.0
    second = meter.step(1000)
    assert meter.last_seconds == 1.0
    assert second["tokens_per_second"] == pytest.approx(2000 / 3)
    assert second["tflops"] == pytest.approx(2000 / 3 / 2 * 2e9 / 1e12)
    assert second["mfu"] == pytest.approx(second["tflops"] * 1e12 / 1e12)


def test_old_steps_leave_the_window():
    clock = Clock()
    meter = Meter(flops_per_token=1.0, window=2, clock=clock)
    for now in (100.0, 101.0, 102.0):
        clock.now = now
        figures = meter.step(10)
    assert figures["step_seconds"] == 1.0
    assert "mfu" not in figures
