"""What inference costs: tokens a second of writing and of scoring, dense and MoE in turn, on one thread."""

from __future__ import annotations

import argparse as sample_text
import inspect
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....moe.blocks import KeyValueCache
from ....moe.models.transformer import Transformer
from ....moe.training.load import load_model

PROMPT, WRITTEN, SCORED = 64, 64, 256  # tokens of each sequence
BATCHES = (1, 16)
WRITING, SCORING = "writing", "scoring"


def measure(sources: Mapping[str, Path], rounds: int = 9, batches: tuple[int, ...] = BATCHES) -> dict[str, Any]:
    """Time the models of some run folders on a CPU thread.

    Writing: greedy, token by token with a key-value cache, after a prompt that is not timed. Scoring: one forward pass
    to the logits of all tokens. The text is real, because routing random bytes would spread over other experts. Calls
    are interleaved, so that a machine that becomes slower does so for all; after a warm-up, medians count.

    Returns: `records` (model, what, batch, tokens a second of wall time: median, least, most; median over CPU time),
        `load_before` and `load_after` (of the machine, over a minute), `threads`, `rounds`.
    """
    loaded = {name: load_model(path) for name, path in sources.items()}
    text = inspect.getsource(sample_text)
    load_before = os.getloadavg()[0]
    records = []
    with one_thread(), torch.inference_mode():
        for what in (WRITING, SCORING):
            for batch in batches:
                timed = {}
                for name, of in loaded.items():
                    tokens = rows_of(of.tokenizer.encode(text), batch, min(SCORED, of.model.config.max_positions))
                    timed[name] = _timer(of.model, tokens, what)
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
                for round_ in range(rounds + 1):
                    for name, call in timed.items():
                        rate = call()
                        if round_:
                            found[name].append(rate)
                records += [_record(name, what, batch, rates) for name, rates in found.items()]
    return {
        "records": records,
        "rounds": rounds,
        "threads": 1,
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
    }


def rows_of(ids: list[int], batch: int, length: int) -> Tensor:
    """(B, S) consecutive stretches of a text, which is repeated where it is short."""
    needed = batch * length
    return torch.tensor((ids * (needed // len(ids) + 1))[:needed]).view(batch, length)


def write(model: Transformer, prompt: Tensor, count: int) -> tuple[Tensor, float, float]:
    """Continue each row greedily: (B, P) -> (B, count), and seconds of wall and CPU time for all but the prompt."""
    cache = KeyValueCache(model.config.layers)
    newest = _likeliest(model, prompt, cache)
    wall, cpu = time.perf_counter(), time.process_time()
    written = []
    for _ in range(count):
        newest = _likeliest(model, newest, cache)
        written.append(newest)
    return torch.cat(written, dim=1), time.perf_counter() - wall, time.process_time() - cpu


def _likeliest(model: Transformer, tokens: Tensor, cache: KeyValueCache) -> Tensor:
    return model.logits(model.hidden(tokens, cache=cache)[:, -1]).argmax(-1, keepdim=True)


def _timer(model: Transformer, tokens: Tensor, what: str) -> Callable[[], tuple[float, float]]:
    """A call that returns tokens a second by wall time and by CPU time."""
    length = tokens.shape[1]
    prompt, count = min(PROMPT, length), min(WRITTEN, model.config.max_positions - PROMPT)

    def writing() -> tuple[float, float]:
        written, wall, cpu = write(model, tokens[:, :prompt], count)
        return written.numel() / wall, written.numel() / cpu

    def scoring() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        model.logits(model.hidden(tokens))
        return tokens.numel() / (time.perf_counter() - wall), tokens.numel() / (time.process_time() - cpu)

    return writing if what == WRITING else scoring


def _record(name: str, what: str, batch: int, rates: list[tuple[float, float]]) -> dict[str, Any]:
    wall = [rate for rate, _ in rates]
    return {
        "model": name,
        "what": what,
        "batch": batch,
        "tokens_per_second": statistics.median(wall),
        "least": min(wall),
        "most": max(wall),
        "tokens_per_cpu_second": statistics.median([rate for _, rate in rates]),
    }


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
