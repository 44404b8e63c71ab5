"""What a rank computes with: speeds that are reached, memory, and links.

Of the devices in the table, peaks, memory and links are the vendors' figures; how much of them is reached, and the time
that a layer takes whatever it computes, are ASSUMPTIONS, until `scatterfold plan calibrate` has measured them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..training.throughput import peak_flops

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")


@dataclass(frozen=True)
class Rates:
    """FLOP per second that are reached: projections and dense MLPs, experts, attention, and the head with its loss."""

    dense: float
    experts: float
    attention: float
    head: float


@dataclass(frozen=True)
class Link:
    """Bytes per second that a rank sends, and seconds that a message takes whatever its size."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Device:
    """One rank's device.

    Attributes:
        kind: cuda or cpu.
        memory: bytes that torch can allocate; None for no bound.
        reserved: of them, what context, communicators and fragmentation need.
        peaks, rates: by precision; MFU is of the peak.
        bandwidth: bytes per second of memory, as reached.
        passes: how often elementwise operations move the bytes that a layer keeps.
        inside: links to ranks on the same machine, by collective.
        network: to other machines, for each rank of a machine.
        ranks_per_node: on one machine.
        layer_seconds: of a dense and a MoE layer forward and backward, besides arithmetic: calls and launches.
        step_seconds: of a step, besides its layers and its head.
        scale: what a dense layer, a MoE layer and the head take in a real step, over the sum of their parts, each
            timed by itself: caches are shared and buffers are new there, and more or fewer rows go to each expert.
        asynchronous: whether calls run ahead of the device, so that they cost only where it would wait for them.
        overlap: share of the computation beside which messages that are asked for ahead can run.
        source: where the figures come from.
        measured: whether this machine was measured, rather than assumed.
    """

    name: str
    kind: str
    memory: int | None
    peaks: dict[str, float]
    rates: dict[str, Rates]
    bandwidth: float
    inside: dict[str, Link]
    network: Link
    ranks_per_node: int = 8
    passes: float = 6.0
    reserved: int = 0
    layer_seconds: dict[str, float] = field(default_factory=lambda: {"dense": 0.0, "moe": 0.0})
    step_seconds: float = 0.0
    scale: dict[str, float] = field(default_factory=lambda: {"dense": 1.0, "moe": 1.0, "head": 1.0})
    asynchronous: bool = False
    overlap: float = 0.0
    source: str = ""
    measured: bool = False

    @property
    def usable(self) -> float | None:
        return None if self.memory is None else self.memory - self.reserved


# ASSUMED shares of the peak: dense products 0.6, grouped ones 0.4 (fused kernels elsewhere reach 413 of 989 TFLOP/s on
# an H100, forward and backward at the experts of Qwen3-30B-A3B), attention 0.35; of memory and link bandwidths 0.75.
_SHARES = {"dense": 0.6, "experts": 0.4, "attention": 0.35, "head": 0.6}
_REACHED = 0.75
# ASSUMED too, as `Device.passes`: what a layer keeps is written once, and read or passed on by about five operations.
_RESERVED = 5 * 2**30  # ASSUMED: context 0.5 GiB, communicators 1 to 2 GiB, fragmentation


def _gpu(
    name: str, gibibytes: float, fp32: float, memory_bandwidth: float, link: float, network: float, source: str
) -> Device:
    bf16 = peak_flops(name)
    assert bf16 is not None
    peaks = {"bf16": bf16, "fp32": fp32}
    # ASSUMED: 10 us a message inside of a machine, 25 us beyond; 0.6 ms and 1.5 ms of launches a layer.
    inside = Link(_REACHED * link, 10e-6)
    return Device(
        name=name.lower(),
        kind="cuda",
        memory=int(gibibytes * 2**30),
        reserved=_RESERVED,
        peaks=peaks,
        rates={key: Rates(**{part: share * peak for part, share in _SHARES.items()}) for key, peak in peaks.items()},
        bandwidth=_REACHED * memory_bandwidth,
        inside=dict.fromkeys(COLLECTIVES, inside),
        network=Link(_REACHED * network, 25e-6),
        layer_seconds={"dense": 0.6e-3, "moe": 1.5e-3},
        step_seconds=5e-3,
        asynchronous=True,
        overlap=0.8,
        source=source,
    )


# Peaks are dense, links one direction. Memory is what torch reports, a little less than on the label; float32 is
# without TF32, which training does not switch on. Between machines one adapter a GPU: 400 Gb/s in DGX H100, H200 and
# B200, 200 Gb/s in DGX A100 (their data sheets).
_TABLE = (
    # NVIDIA H100 data sheet, SXM: 66.9 TFLOP/s float32, 3.35 TB/s, NVLink 900 GB/s both ways.
    _gpu("H100", 79, 66.9e12, 3.35e12, 450e9, 50e9, "NVIDIA H100 SXM data sheet"),
    # NVIDIA H200 data sheet, SXM: as H100 with 141 GB at 4.8 TB/s.
    _gpu("H200", 139, 66.9e12, 4.8e12, 450e9, 50e9, "NVIDIA H200 SXM data sheet"),
    # NVIDIA A100 80GB data sheet, SXM: 19.5 TFLOP/s float32, 2,039 GB/s, NVLink 600 GB/s both ways.
    _gpu("A100", 79, 19.5e12, 2.039e12, 300e9, 25e9, "NVIDIA A100 80GB SXM data sheet"),
    # NVIDIA HGX B200 data sheet, an eighth of the board: 75 TFLOP/s float32, 180 GB at 7.7 TB/s, NVLink 1.8 TB/s.
    _gpu("B200", 178, 75e12, 7.7e12, 900e9, 50e9, "NVIDIA HGX B200 data sheet"),
    # ASSUMED: two threads of a server CPU a rank, messages through memory; `plan calibrate` measures a real one.
    Device(
        name="cpu",
        kind="cpu",
        memory=None,
        peaks={"fp32": 150e9, "bf16": 300e9},
        rates={"fp32": Rates(120e9, 90e9, 40e9, 100e9), "bf16": Rates(200e9, 140e9, 40e9, 150e9)},
        bandwidth=8e9,
        inside=dict.fromkeys(COLLECTIVES, Link(1e9, 200e-6)),
        network=Link(1e9, 300e-6),
        ranks_per_node=64,
        layer_seconds={"dense": 2e-3, "moe": 5e-3},
        step_seconds=5e-3,
        source="assumed",
    ),
)
DEVICES = {device.name: device for device in _TABLE}


def with_nodes(device: Device, ranks_per_node: int | None) -> Device:
    """The device on machines of another size; None for as it is."""
    return device if ranks_per_node is None else replace(device, ranks_per_node=ranks_per_node)
