"""Distributed checkpoints of Megatron-Core: a GPTModel, dense or with experts, both ways. Needs nothing of Megatron."""

from .locate import is_megatron
from .read import open_megatron
from .write import write_megatron

__all__ = ["is_megatron", "open_megatron", "write_megatron"]
