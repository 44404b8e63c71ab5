"""Both passes of a layer, chunk of experts by chunk of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activate_backward_out, activate_out
from ..fused_operator import ExpertLayer
from .chunks import split
from .rows import TokenSums
from .slots import OneExpert, SeveralExperts, slots_of


class ByChunks:
    """Buffers are used again by the next chunk, so they stay in cache and cost no page faults."""

    def __init__(self, layer: ExpertLayer):
        self.layer, x = layer, layer.x
        self.hidden = layer.w_in.shape[1]
        self.width, self.expert_width = layer.w_out.shape[1:]
        self.offsets: list[int] = layer.expert_offsets.tolist()  # the one host synchronisation
        # Off the CPU, sums by token are in a fixed order only if no token comes twice in a chunk.
        self.chunks = split(self.offsets, max(self.width, self.hidden), x.dtype, batch=x.is_cpu)
        self.longest = max((chunk.size for chunk in self.chunks), default=0)
        self.scale = layer.weight.to(x.dtype)[:, None]  # mixed dtypes would make the pass several times slower
        self.w_up = layer.w_in.transpose(1, 2)

    def forward(self, save_z: bool) -> tuple[Tensor, Tensor]:
        layer, x = self.layer, self.layer.x
        z = x.new_empty(layer.token.numel(), self.hidden) if save_z else None
        z_buffer, a_buffer = self._buffer(self.hidden), self._buffer(self.expert_width)
        w_down = layer.w_out.transpose(1, 2)
        sums = TokenSums(x, layer.num_tokens)
        for slots in slots_of(self.chunks, layer.token, self.scale):
            rows = slots.gather(x)
            z_live = self._pre_activation(slots, rows, z, z_buffer)
            a, y = a_buffer[: slots.live], rows[: slots.live]
            activate_out(layer.activation, z_live, out=a, inner=a)
            a.mul_(slots.scale)
            slots.through(a_buffer, w_down, out=rows)
            if layer.b_out is not None:
                slots.add_scaled(y, layer.b_out)
            sums.add(y, slots.token)
        return sums.result(), x.new_empty(0) if z is None else z

    def backward(self, grad: Tensor, z: Tensor, needs: list[bool]) -> list[Tensor]:
        layer, x = self.layer, self.layer.x
        grads = self._new_gradients(needs)
        need_x, need_in, _, need_b_in, _, need_weight = needs
        sums = TokenSums(x, layer.num_tokens) if need_x else None
        z_buffer = None if z.numel() else self._buffer(self.hidden)
        dz_buffer = self._buffer(self.hidden)
        a_buffer, da_buffer = self._buffer(self.expert_width), self._buffer(self.expert_width)
        for slots in slots_of(self.chunks, layer.token, self.scale):
            a, da, dz = a_buffer[: slots.live], da_buffer[: slots.live], dz_buffer[: slots.live]
            slots.clear_rest(a_buffer)
            slots.clear_rest(dz_buffer)
            if z_buffer is None:
                z_live = slots.spread(z[slots.place])
            else:
                z_live = self._pre_activation(slots, slots.gather(x), None, z_buffer)
            rows = slots.gather(grad)
            slots.through(rows, layer.w_out, out=da_buffer)  # of the un-weighted activation
            activate_out(layer.activation, z_live, out=a, inner=dz[:, -self.expert_width :])
            if need_weight:
                inner = torch.mul(da, a, out=dz[:, : self.expert_width]).sum(-1, dtype=layer.weight.dtype)
                if layer.b_out is not None:
                    inner += slots.products(rows[: slots.live], layer.b_out)
                slots.collect(inner, out=grads[5][slots.place])
            self._output_gradients(slots, rows, a_buffer, grads, needs)
            if not (need_x or need_in or need_b_in):
                continue
            activate_backward_out(layer.activation, z_live, da.mul_(slots.scale), dz)
            if need_b_in:
                slots.sum_rows(dz_buffer, out=grads[3])
            if need_in:
                del rows  # one buffer of this size at a time
                rows = slots.gather(x)
                slots.over_rows(dz_buffer, rows, out=grads[1])
            if sums is not None:
                slots.through(dz_buffer, layer.w_in, out=rows)
                sums.add(rows[: slots.live], slots.token)
        if sums is not None:
            grads[0] = sums.result()
        return grads

    def _output_gradients(
        self,
        slots: OneExpert | SeveralExperts,
        rows: Tensor,
        a_buffer: Tensor,
        grads: list[Tensor],
        needs: list[bool],
    ) -> None:
        """Gradients of w_out and b_out. Scales the activation in `a_buffer`."""
        _, _, need_out, _, need_b_out, _ = needs
        if need_out:
            a_buffer[: slots.live].mul_(slots.scale)
            slots.over_rows(rows, a_buffer, out=grads[2])
        if need_b_out:
            slots.sum_scaled_rows(rows[: slots.live], out=grads[4])

    def _buffer(self, width: int) -> Tensor:
        return self.layer.x.new_empty(self.longest, width)

    def _pre_activation(
        self, slots: OneExpert | SeveralExperts, rows: Tensor, z: Tensor | None, buffer: Tensor
    ) -> Tensor:
        """Pre-activation of gathered rows, live rows only; kept in its place in z if that is given.

        That of one expert is written there. Its empty rows spill into those of the next expert, which comes later and
        overwrites them.
        """
        out, start = buffer, slots.place.start
        if z is not None and isinstance(slots, OneExpert) and start + slots.height <= z.shape[0]:
            out = z[start : start + slots.height]
        slots.through(rows, self.w_up, out, self.layer.b_in)
        if z is not None and out is buffer:
            slots.collect(out[: slots.live], out=z[slots.place])
        return out[: slots.live]

    def _new_gradients(self, needs: list[bool]) -> list[Tensor]:
        """Gradients to be written in place, already zero where no chunk writes."""
        grads = self.layer.new_gradients([False, *needs[1:]])  # that of x comes from sums
        for grad in grads[1:5]:
            if grad.numel():
                for expert, (start, end) in enumerate(zip(self.offsets, self.offsets[1:])):
                    if start == end:
                        grad[expert].zero_()
        grads[5][self.offsets[-1] :].zero_()
        return grads
