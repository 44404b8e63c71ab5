"""torch's pipeline stage, fitted to micro-batches that are not slices of one tensor.

The second file, beside torch_private.py, that overrides private names of torch (`_prepare_*_infra`); apart from it for
what it loads. Written against torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage


class Stage(PipelineStage):
    """A pipeline stage whose micro-batches are values of any kind, looked up by their number.

    A schedule cuts tensors into micro-batches along the batch. Here it cuts a tensor of numbers, and each stage hands
    its part the keyword arguments of that micro-batch.

    torch keeps a buffer for the input and the output gradient of every micro-batch of a step, which takes away what
    1F1B saves. Here a buffer exists from the receive to the end of the backward pass that uses it.

    Args:
        part: called as `part(**micro_batch)`, or `part(**micro_batch, received=hidden)` if it is not the first.
        index, stages: number of this stage, and how many there are.
        device: of the part.
        group: the ranks of the pipeline.
        hidden: on the meta device, of the shape and type of what is passed between stages.
        forward_context: around each forward pass.
    """

    def __init__(
        self,
        part: nn.Module,
        index: int,
        stages: int,
        device: torch.device,
        group: dist.ProcessGroup,
        hidden: Tensor,
        forward_context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        hidden = hidden.requires_grad_()
        loss = torch.empty((), device="meta", requires_grad=True)
        is_last = index == stages - 1
        super().__init__(
            part,
            index,
            stages,
            device,
            input_args=() if index == 0 else (hidden,),
            output_args=(loss if is_last else hidden,),
            group=group,
        )
        self.micro_batches: Sequence[Mapping[str, Any]] = ()
        self._hidden = hidden
        self._forward_context = forward_context
        self._freed = torch.empty(0, device=device)

    def forward_maybe_with_nosync(self, *received: Tensor, number: Tensor) -> Tensor:
        micro_batch = self.micro_batches[int(number)]
        with self._forward_context():
            options = {} if self.is_first else {"received": received[0]}
            out = self.submod(**micro_batch, **options)
        if not self.is_last and (out.shape, out.dtype) != (self._hidden.shape, self._hidden.dtype):
            raise RuntimeError(
                f"stage {self.stage_index} returned {tuple(out.shape)} {out.dtype}, "
                f"but {tuple(self._hidden.shape)} {self._hidden.dtype} was promised to the next"
            )
        return out

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        for info in self._received(self.args_recv_info, fwd_chunk_id):
            info.buffer = torch.empty_like(self._hidden, device=self.device, requires_grad=self.has_backward)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        for info in self._received(self.grad_recv_info, bwd_chunk_id):
            info.buffer = torch.empty_like(self._hidden, device=self.device, requires_grad=False)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **options)
        self._free(self.args_recv_info, bwd_chunk_id)
        self._free(self.grad_recv_info, bwd_chunk_id)

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False) -> Any:
        if backward_type != "full":  # torch looks for the gathered parameters in the graph, and skips what it misses
            for module in self.submod.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)

    def _prepare_forward_infra(self, num_microbatches: int, *args: Any, **options: Any) -> Any:
        result = super()._prepare_forward_infra(num_microbatches, *args, **options)
        for number in range(num_microbatches):
            self._free(self.args_recv_info, number)
        return result

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **options: Any) -> Any:
        result = super()._prepare_backward_infra(num_microbatches, *args, **options)
        for number in range(num_microbatches):
            self._free(self.grad_recv_info, number)
        return result

    def _free(self, infos: Mapping[int, Any], number: int) -> None:
        for info in self._received(infos, number):
            info.buffer = self._freed

    @staticmethod
    def _received(infos: Mapping[int, Any], number: int) -> list[Any]:
        """The descriptions of tensors that come from other stages; inputs of the model have none."""
        return [info for info in infos.get(number, ()) if getattr(info, "buffer", None) is not None]


def can_split_backward() -> bool:
    """Whether a backward pass can start at a node of a custom function, as torch 2.11 refuses.

    Schedules that split the backward pass finish it from the nodes where weights come in, and our kernels are such.
    """
    x = torch.ones(1, requires_grad=True)
    edge = GradientEdge(_Identity.apply(x).grad_fn, 0)
    try:
        torch.autograd.grad([edge], [x], grad_outputs=[torch.ones(1)])
    except RuntimeError:
        return False
    return True


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad
