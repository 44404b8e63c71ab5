"""Configurations whose estimates are held against measurement."""

from __future__ import annotations

from dataclasses import dataclass

BASE = (
    "model=small",
    "model.vocab_size=2048",
    "model.layers=4",
    "model.width=256",
    "data.sequence_length=256",
    "data.global_batch_size=8",
    "data.pack_documents=false",
    "logger.display=none",
)


@dataclass(frozen=True)
class Case:
    """So many ranks, and what is changed of BASE."""

    ranks: int
    words: tuple[str, ...] = ()


CASES = {
    "dense": Case(1, ("model.num_experts=0",)),
    "moe": Case(1),
    "micro-batches": Case(1, ("data.micro_batch_size=2",)),
    "checkpointing-full": Case(1, ("trainer.activation_checkpointing=full",)),
    "checkpointing-selective": Case(1, ("trainer.activation_checkpointing=selective",)),
    "long": Case(1, ("data.sequence_length=1024", "data.global_batch_size=2")),
    "bf16": Case(1, ("trainer.precision=bf16",)),
    "copies": Case(2),
    "ep": Case(2, ("layout.ep=2",)),
    "shards": Case(2, ("layout.dp_shard=2",)),
    "shards-ep": Case(2, ("layout.dp_shard=2", "layout.ep=2")),
    "tp": Case(2, ("layout.tp=2",)),
    "cp": Case(2, ("layout.cp=2",)),
    "stages": Case(2, ("layout.pp=2", "data.micro_batch_size=2")),
}
