"""What each kind of group of a layout communicates, and when: the engine's and the model's habits in words."""

from __future__ import annotations

from dataclasses import dataclass

from ..layout import ResolvedLayout


@dataclass(frozen=True)
class Communication:
    """One kind of message.

    Attributes:
        group: name of the groups, as in `ResolvedLayout.groups`; `world` for all ranks.
        collective: which.
        what: is sent.
        when: how often.
    """

    group: str
    collective: str
    what: str
    when: str


def communications(layout: ResolvedLayout) -> list[Communication]:
    """All kinds of messages of a training step, most frequent first; groups of one rank send none."""
    sizes = {name: len(groups[0]) for name, groups in layout.groups().items()} | {"world": layout.world}
    found = [*_of_activations(), *_of_dense(layout), *_of_experts(layout), *_of_steps()]
    return [message for message in found if sizes[message.group] > 1]


def _of_activations() -> list[Communication]:
    layer = "each attention and dense MLP, forward and backward"
    return [
        Communication("tp", "all-gather, reduce-scatter", "activations of the parts of a sequence", layer),
        Communication("cp", "all-gather, reduce-scatter", "keys and values, and their gradients", "each attention"),
        Communication("dispatch", "all-to-all", "tokens to their experts and back", "each MoE layer, twice a pass"),
        Communication("sequence", "all-reduce", "counts of balance losses per sequence", "each MoE layer, forward"),
        Communication(
            "pp", "send, receive", "hidden states, and their gradients", "each micro-batch, to the next stage"
        ),
    ]


def _of_dense(layout: ResolvedLayout) -> list[Communication]:
    step = "after the last micro-batch"
    if layout.dp_shard > 1:
        messages = [
            Communication("dp_cp", "all-gather", "parameters outside of experts", "before each block, each pass"),
            Communication("dp_cp", "reduce-scatter", "gradients outside of experts", step),
            Communication("dp_replicate", "all-reduce", "gradients of the shards", step),
        ]
        few = (
            "gradients of what is not cut: norms and routers"
            if layout.tp > 1
            else "gradients of what is not cut (bf16)"
        )
        return [*messages, Communication("stage", "all-reduce", few, step)]
    messages = []
    if layout.tp > 1:
        cut = "gradients of what tp cuts"
        messages += [Communication(name, "all-reduce", cut, step) for name in ("dp_replicate", "dp_cp")]
    rest = "gradients of norms and routers" if layout.tp > 1 else "gradients outside of experts"
    return [*messages, Communication("stage", "all-reduce", rest, step)]


def _of_experts(layout: ResolvedLayout) -> list[Communication]:
    if not layout.is_folded:
        return []  # as for the rest
    step = "after the last micro-batch"
    return [
        Communication("edp_shard", "all-gather", "parameters of experts", "before each MoE layer, each pass"),
        Communication("edp_shard", "reduce-scatter", "gradients of experts", step),
        Communication("edp_replicate", "all-reduce", "gradients of experts", step),
        Communication("etp", "all-reduce", "gradients of the experts' output biases", step),
    ]


def _of_steps() -> list[Communication]:
    return [Communication("world", "all-reduce", "loss, gradient norm and router counts", "each step")]
