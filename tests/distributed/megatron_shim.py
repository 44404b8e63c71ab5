"""For tests only: lets Megatron-Core, which asks for CUDA in many places, run on the CPU over gloo.

`install()` changes torch.cuda and a few functions of torch in this process, for good: call it in ranks that a test
starts, never in the process of pytest. Nothing of Megatron's arithmetic is touched.
"""

import contextlib

import torch


class Event:
    def __init__(self, *args, **options):
        pass

    def record(self, *args):
        pass

    wait = synchronize = record


class Stream(Event):
    def wait_stream(self, other):
        pass

    wait_event = wait_stream

    def record_event(self, event=None):
        return event or Event()


def install():
    cpu = torch.device("cpu")
    cuda = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *args, **options: None
    cuda.current_stream = cuda.default_stream = lambda *args, **options: Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream, cuda.Event = Stream, Event
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **options: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **options: torch.set_rng_state(state)
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **options: self
    plain = torch.Tensor.type
    torch.Tensor.type = lambda self, *args, **options: _as_cuda(plain(self, *args, **options))

    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer
    import megatron.core.tensor_parallel.random as generators

    writer._process_memory = lambda: 0  # which it logs, and needs psutil for

    generators._get_cuda_rng_state = lambda *args, **options: torch.get_rng_state()
    generators._set_cuda_rng_state = lambda state, *args, **options: torch.set_rng_state(state)


def stop_writers():
    """End the process that Megatron keeps for writing; ranks of tests leave without the exit that would."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer

    if writer._results_queue is not None:
        writer._results_queue._manager.shutdown()
        writer._results_queue = None


def _on_cpu(function):
    """The same, which understands device="cuda" as the CPU."""

    def make(*args, **options):
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        options.pop("pin_memory", None)
        return function(*args, **options)

    return make


def _as_cuda(found):
    """Names of types as Megatron's optimizers compare them."""
    is_name = isinstance(found, str) and not found.startswith("torch.cuda.")
    return found.replace("torch.", "torch.cuda.", 1) if is_name else found
