"""How a module's weights are cut over the ranks of a tp mesh, for torch's `parallelize_module`.

Apart from `parallel.tensor.collectives` because it loads much of torch.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle


class CutParameters(ParallelStyle):
    """Make parameters DTensors that are cut over the tp ranks; the module computes with `local_part(…)`.

    torch's ColwiseParallel and RowwiseParallel cut weights alike, but also turn activations into DTensors.

    Args:
        dims: name of each parameter, and the dimension along which it is cut; names that the module lacks are ignored.
    """

    def __init__(self, **dims: int) -> None:
        super().__init__()
        self.dims = dims

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, whole in list(module.named_parameters(recurse=False)):
            if name in self.dims:
                placements = [Shard(self.dims[name])]
                cut = distribute_tensor(whole.data, device_mesh, placements, src_data_rank=self.src_data_rank)
                module.register_parameter(name, nn.Parameter(cut, requires_grad=whole.requires_grad))
        return module


def cut_outputs() -> ParallelStyle:
    """A projection that makes a slice of the output channels on each rank."""
    return CutParameters(weight=0, bias=0)


def cut_inputs() -> ParallelStyle:
    """A projection that reads a slice of the channels on each rank, whose results are to be summed, its bias after."""
    return CutParameters(weight=1)
