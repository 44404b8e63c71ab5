"""Bytes that a layer keeps from its forward to its backward pass, for one micro-batch on one rank.

Letters: s tokens on this rank, n = TP s tokens that attention and dense MLPs see (tensor parallel ranks gather the
sequence and cut heads and widths instead), w bytes of an element in matrix products (4, or 2 under bf16). Hidden states
between halves of a block are float32, as parameters are.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels import is_gated
from ...kernels.cpu.chunks import CHUNK_BYTES
from .job import Job


@dataclass(frozen=True)
class Kept:
    """Bytes of one half of a layer, or of several.

    Attributes:
        activations: what autograd saves.
        dispatch: of it, what came from other ranks, and the tables of where it came from.
    """

    activations: float = 0.0
    dispatch: float = 0.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.activations + other.activations, self.dispatch + other.dispatch)

    def __mul__(self, factor: float) -> Kept:
        return Kept(self.activations * factor, self.dispatch * factor)

    @property
    def total(self) -> float:
        return self.activations + self.dispatch


def kept_by_layer(job: Job, layer: int) -> Kept:
    """What is kept between the passes, by `trainer.activation_checkpointing`.

    none      both halves
    selective the attention half, the input of the other one (4 s D), and the router's decision (8 s K)
    full      the input of the block, and the decision
    """
    checkpointing = job.workload.plan.trainer.activation_checkpointing
    if checkpointing == "none":
        return whole_layer(job, layer)
    config = job.workload.config
    decision = 8.0 * job.tokens * job.workload.experts_per_token if config.is_moe(layer) else 0.0
    recomputed = Kept(4.0 * job.tokens * config.width + decision)
    return attention_half(job, layer) + recomputed if checkpointing == "selective" else recomputed


def recomputed_by_layer(job: Job, layer: int) -> Kept:
    """What the backward pass of a layer computes again, beyond what was kept."""
    return whole_layer(job, layer) + kept_by_layer(job, layer) * -1.0


def whole_layer(job: Job, layer: int) -> Kept:
    return attention_half(job, layer) + mlp_half(job, layer)


def attention_half(job: Job, layer: int) -> Kept:
    """RMSNorm, projections, rotary positions, attention.

    norm      its input 4 s D and 1 / rms 4 s; its output w n D, which three projections read
    q, k, v   w n (H + 2 G) W / TP as attention reads them, after rotation; QK-norm keeps what it reads besides, and
              1 / rms: 4 n (H + G) / TP over each head, 8 n over all (cut over tp it keeps float32 steps in between)
    attention its output w n H W / TP, which the last projection reads, and log-sum-exp 4 n H / TP. On a CPU, packed
              documents and rows with a window are computed in runs whose outputs are joined: once more w n H W / TP,
              and with a window its mask w S S
    cp        keys and values of all tokens before a chunk's end, for both chunks of a rank: (2 CP + 1) of 2 CP chunks,
              2 w (2 CP + 1) / (2 CP) B S G W / TP instead of the rank's own; queries change their order, outputs back
    """
    config, layout, width = job.workload.config, job.layout, job.workload.element_bytes
    s, n = job.tokens, job.cp_tokens
    queries = config.heads * config.head_size / layout.tp
    keys = config.num_kv_heads * config.head_size / layout.tp
    heads, all_heads = config.heads / layout.tp, (config.heads + config.num_kv_heads) / layout.tp
    kept = 4.0 * s * (config.width + 1) + width * n * config.width + width * n * queries
    if layout.cp == 1:
        kept += 2.0 * width * n * keys + (width * job.sequence_length**2 if job.masks_on_cpu(layer) else 0.0)
    else:
        seen = n * layout.cp * (2 * layout.cp + 1) / (2 * layout.cp)
        kept += 2.0 * width * seen * keys + (_mask_bytes(job) if job.workload.device_type == "cpu" else 0.0)
    if config.qk_norm == "head":
        kept += width * n * (queries + keys) + 4.0 * n * all_heads
    elif config.qk_norm == "projection":
        kept += width * n * (queries + keys) + 8.0 * n
        if layout.tp > 1:
            kept += (4.0 if width == 4 else 8.0) * n * (queries + keys)
    copies = 1 + (job.packs_on_cpu or job.masks_on_cpu(layer) or layout.cp > 1)
    return Kept(kept + copies * width * n * queries + 4.0 * n * heads)


def _mask_bytes(job: Job) -> float:
    """Masks of a rank's two chunks of c = S / (2 CP) queries before keys to their ends, 4 c (2 CP + 1) c bytes or 2."""
    chunk = job.sequence_length / (2 * job.layout.cp)
    return job.workload.element_bytes * chunk * chunk * (2 * job.layout.cp + 1)


def mlp_half(job: Job, layer: int) -> Kept:
    """RMSNorm, and a dense MLP or experts: the norm's input 4 s D and 1 / rms 4 s, and what follows."""
    config = job.workload.config
    norm = Kept(4.0 * job.tokens * (config.width + 1))
    if config.is_moe(layer):
        return norm + _moe(job)
    return norm + Kept(_mlp(job, config.ffn_width or 0) + job.workload.element_bytes * job.cp_tokens * config.width)


def _mlp(job: Job, hidden: int) -> float:
    """A dense MLP without its input: what the activation keeps, and its result, each w n F / TP.

    silu(gate) x up keeps gate, silu(gate), up and the product; relu keeps no gate, clamps keep three steps more.
    Without a gate: the result of the activation and its input, which relu does not need.
    """
    activation = job.workload.config.activation
    usual = 4 if is_gated(activation) else 2
    tensors = {"reglu": 3, "clamped_swiglu": 7, "relu": 1}.get(activation, usual)
    return job.workload.element_bytes * job.cp_tokens * tensors * hidden / job.layout.tp


def _moe(job: Job) -> Kept:
    """Router, dispatch, experts and shared expert.

    router    its input in float32, 4 s D (under fp32 the very tensor that local experts read), scores and what losses
              read 4 s E each, ids and order of the chosen 16 s K, their scores before they are normalised 4 s K + 4 s
    experts   R rows w R D, z of N assignments w N 2 F / ETP, and of each assignment row, weight and place, 12 bytes
    dispatch  R and N are what arrived, and 8 bytes more an assignment for the order in which they were sorted; besides,
              where what was sent belongs: 8 bytes an assignment, 12 a row and 4 a token
    shared    an MLP, whose input is w n D once more where tp gathers it, or where the experts read rows that travelled
    """
    load, config, width = job.workload, job.workload.config, job.workload.element_bytes
    s, top_k = job.tokens, job.workload.experts_per_token
    travels = job.dispatch_ranks > 1
    router = 4.0 * s * config.width + 4.0 * s * config.num_experts * load.router_matrices + 16.0 * s * top_k
    router += load.router_columns * 4.0 * s * (top_k + 1) + (4.0 * s * config.width if load.jitter else 0.0)
    z = 0 if load.experts_recompute else (config.expert_width or 0) * (2 if is_gated(load.expert_activation) else 1)
    experts = width * job.assignments * z / job.layout.etp + 12.0 * job.assignments + 4.0 * job.rows
    rows = width * job.rows * config.width
    kept = router + experts
    if not travels:
        kept += rows if width == 2 or load.jitter else 0.0
    if config.shared_expert_width is not None:
        kept += _mlp(job, config.shared_expert_width)
        if job.layout.tp > 1 or (travels and width == 2):
            kept += width * job.cp_tokens * config.width
        if config.shared_expert_gate:
            kept += width * s * (config.width + 2)
    if not travels:
        return Kept(kept)
    sent_rows, sent = job.rows, s * top_k * job.layout.etp
    return Kept(kept, rows + 8.0 * job.assignments + 8.0 * sent + 12.0 * sent_rows + 4.0 * s)


def backward_buffers(job: Job, layer: int) -> float:
    """What the backward pass of a layer holds for a moment: gradients of the hidden states, and of the largest half.

    hidden    the gradient that comes in, and that of the half's input: 8 s D
    attention gradients of q, k, v and of attention's output, w n (2 H + 2 G) W / TP
    dense     gradients of gate, up and product, w n 3 F / TP
    experts   on a GPU gradient rows and a, da, dz: w N (D + 4 F); on a CPU the same and z for the rows of a chunk, up
              to 4 MiB or one expert, and sums by row, in float32 and as they are returned: 8 R D
    """
    config, layout, width = job.workload.config, job.layout, job.workload.element_bytes
    n = job.cp_tokens
    attention = width * n * 2.0 * (config.heads + config.num_kv_heads) * config.head_size / layout.tp
    if not config.is_moe(layer):
        half = width * n * 3.0 * (config.ffn_width or 0) / layout.tp
    else:
        slice = (config.expert_width or 0) / layout.etp
        half = width * job.assignments * (config.width + 4.0 * slice)
        if job.workload.device_type == "cpu":
            chunk = max(
                CHUNK_BYTES / (width * max(config.width, 2 * slice)), job.assignments * layout.ep / config.num_experts
            )
            half = 8.0 * job.rows * config.width
            half += width * min(chunk, job.assignments) * (config.width + 6.0 * slice)
    return 8.0 * job.tokens * config.width + max(attention, half)


def dispatch_buffers(job: Job) -> float:
    """Rows of one layer on their way, and the sums on their way back: w R D each, and those that are collected."""
    if job.dispatch_ranks == 1:
        return 0.0
    return 2.0 * job.workload.element_bytes * job.rows * job.workload.config.width
