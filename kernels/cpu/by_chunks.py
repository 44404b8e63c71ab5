"""Both passes of a layer, chunk of experts by chunk of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activate_backward_out, activate_out
from ..fused_operator import ExpertLayer
from .chunks import Slots, split
from .rows import TokenSums


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

    def forward(self, save_z: bool) -> tuple[Tensor, Tensor]:
        layer, x = self.layer, self.layer.x
        z = x.new_empty(layer.token.numel(), self.hidden) if save_z else None
        z_buffer, a_buffer = self._buffer(self.hidden), self._buffer(self.expert_width)
        sums = TokenSums(x, layer.num_tokens)
        for chunk in self.chunks:
            slots = Slots(chunk, layer.token, self.scale)
            rows = slots.gather(x)
            z_own = self._pre_activation(slots, rows, z, z_buffer)
            a, y = a_buffer[: slots.live], rows[: slots.live]
            activate_out(layer.activation, z_own, out=a, inner=a)
            a.mul_(slots.scale)
            self._through(slots, a_buffer, layer.w_out.transpose(1, 2), out=rows)
            if layer.b_out is not None:
                for run, experts in chunk.runs:
                    scale, bias = slots.by_slot(slots.scale)[run], layer.b_out[experts][:, None]
                    slots.by_slot(y)[run].baddbmm_(scale, bias)
            sums.add(y, slots.token)
        return sums.result(), x.new_empty(0) if z is None else z

    def backward(self, grad: Tensor, z: Tensor, needs: list[bool]) -> list[Tensor]:
        layer, x = self.layer, self.layer.x
        grads = self._new_gradients(needs)
        need_x, need_in, _, need_b_in, _, _ = needs
        sums = TokenSums(x, layer.num_tokens) if need_x else None
        z_buffer = None if z.numel() else self._buffer(self.hidden)
        dz_buffer = self._buffer(self.hidden)
        a_buffer, da_buffer = self._buffer(self.expert_width), self._buffer(self.expert_width)
        for chunk in self.chunks:
            slots = Slots(chunk, layer.token, self.scale)
            da, dz = da_buffer[: slots.live], dz_buffer[: slots.live]
            slots.clear_rest(a_buffer)
            slots.clear_rest(dz_buffer)
            if z_buffer is None:
                z_own = slots.spread(z[chunk.rows])
            else:
                z_own = self._pre_activation(slots, slots.gather(x), None, z_buffer)
            rows = slots.gather(grad)
            self._through(slots, rows, layer.w_out, out=da_buffer)  # of the un-weighted activation
            activate_out(layer.activation, z_own, out=a_buffer[: slots.live], inner=dz[:, -self.expert_width :])
            self._output_gradients(slots, rows, a_buffer, da, dz[:, : self.expert_width], grads, needs)
            if not (need_x or need_in or need_b_in):
                continue
            activate_backward_out(layer.activation, z_own, da.mul_(slots.scale), dz)
            if need_b_in:
                for run, experts in chunk.runs:
                    torch.sum(slots.full(dz_buffer)[run], 1, out=grads[3][experts])
            if need_in:
                del rows  # one buffer of this size at a time
                rows = slots.gather(x)
                self._over_rows(slots, dz_buffer, rows, out=grads[1])
            if sums is not None:
                self._through(slots, dz_buffer, layer.w_in, out=rows)
                sums.add(rows[: slots.live], slots.token)
        if sums is not None:
            grads[0] = sums.result()
        return grads

    def _output_gradients(
        self,
        slots: Slots,
        rows: Tensor,
        a_buffer: Tensor,
        da: Tensor,
        product: Tensor,
        grads: list[Tensor],
        needs: list[bool],
    ) -> None:
        """Gradients of the combine weights, w_out and b_out. Scales a; overwrites `product`."""
        layer, chunk, a, live = self.layer, slots.chunk, a_buffer[: slots.live], rows[: slots.live]
        _, _, need_out, _, need_b_out, need_weight = needs
        if need_weight:
            inner = torch.mul(da, a, out=product).sum(-1, dtype=layer.weight.dtype)
            if layer.b_out is not None:
                for run, experts in chunk.runs:
                    bias = layer.b_out[experts][:, :, None]
                    inner.view(chunk.slots, -1)[run] += torch.bmm(slots.by_slot(live)[run], bias)[..., 0]
            slots.collect(inner, out=grads[5][chunk.rows])
        if need_out:
            a.mul_(slots.scale)
            self._over_rows(slots, rows, a_buffer, out=grads[2])
        if need_b_out:
            scale = slots.by_slot(slots.scale).transpose(1, 2)
            for run, experts in chunk.runs:
                torch.bmm(scale[run], slots.by_slot(live)[run], out=grads[4][experts][:, None])

    def _buffer(self, width: int) -> Tensor:
        return self.layer.x.new_empty(self.longest, width)

    def _through(self, slots: Slots, rows: Tensor, w: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        """out = rows @ w[e] + bias[e], w (E, I, O)."""
        rows, out = slots.full(rows), slots.full(out)
        for run, experts in slots.chunk.runs:
            if bias is None:
                torch.bmm(rows[run], w[experts], out=out[run])
            else:
                torch.baddbmm(bias[experts][:, None], rows[run], w[experts], out=out[run])

    def _over_rows(self, slots: Slots, left: Tensor, right: Tensor, out: Tensor) -> None:
        """out[e] = left^T @ right, over the rows of expert e."""
        left, right = slots.full(left).transpose(1, 2), slots.full(right)
        for run, experts in slots.chunk.runs:
            torch.bmm(left[run], right[run], out=out[experts])

    def _pre_activation(self, slots: Slots, rows: Tensor, z: Tensor | None, buffer: Tensor) -> Tensor:
        """Pre-activation of gathered rows, live rows only; kept in z if it is given.

        A single slot is written to its place in z. Its empty rows spill into those of the next expert, which comes
        later and overwrites them.
        """
        chunk = slots.chunk
        start, end = chunk.rows.start, chunk.rows.start + chunk.size
        direct = z is not None and chunk.slots == 1 and end <= z.shape[0]
        out = z[start:end] if z is not None and direct else buffer
        self._through(slots, rows, self.layer.w_in.transpose(1, 2), out, self.layer.b_in)
        if z is not None and not direct:
            slots.collect(out[: slots.live], out=z[chunk.rows])
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
