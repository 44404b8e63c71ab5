"""`scatterfold sample`: text from a trained model, as it is written."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .arguments import argument
from .subcommands import run_command


@dataclass(frozen=True)
class Sample:
    """Write text with a trained model."""

    EXAMPLE: ClassVar[str] = (
        'scatterfold sample source=runs/demo prompt="def " max_tokens=400 temperature=0.7 top_p=0.95'
    )

    source: Path = argument("run folder, one of its checkpoints, or a model of another format")
    prompt: str = argument("text to continue; empty to begin a document", default="")
    max_tokens: int = argument("most tokens to write; the end of a document ends the text too", default=200, least=0)
    temperature: float = argument("0 takes the likeliest token, more is bolder", default=0.0)
    top_p: float = argument("sample from the likeliest tokens that hold this much probability", default=1.0)
    seed: int = argument("of the sampling", default=0)
    device: str = argument("where to compute", default="auto", choices=("auto", "cpu", "cuda"))
    json: Path | None = argument("also write prompt, text and speed to this file", default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(Sample, _run, argv)


def _run(settings: Sample) -> int:
    import torch

    from ..moe.generate import generate
    from ..moe.training.load import load_model
    from .files import check_target, write_atomically

    check_target(settings.json)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    loaded = load_model(settings.source, device)
    tokenizer = loaded.tokenizer
    # A document begins with the separator, in training and here.
    prompt = [tokenizer.eod, *tokenizer.encode(settings.prompt)]
    start = time.monotonic()
    tokens: list[int] = []
    pieces: list[str] = []
    generated = generate(
        loaded.model,
        prompt,
        settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        stop=tokenizer.eod,
    )
    sys.stdout.write(settings.prompt)
    for piece in stream(_remembered(generated, tokens), tokenizer.decode):
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    if settings.json is not None:
        seconds = time.monotonic() - start
        figures = {
            "source": str(loaded.checkpoint),
            "step": loaded.step,
            "prompt": settings.prompt,
            "text": "".join(pieces),
            "tokens": len(tokens),
            "tokens_per_second": len(tokens) / seconds if seconds > 0 else None,
        }
        write_atomically(settings.json, json.dumps(figures, indent=2) + "\n")
    return 0


def stream(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Text as soon as it is certain: a character whose bytes are spread over tokens waits for the last of them.

    Decodes a short window of tokens each time, with those before it for context, because a tokenizer may treat the
    first token of a text differently.
    """
    ids: list[int] = []
    context = said = 0
    for token in tokens:
        ids.append(token)
        before, now = decode(ids[context:said]), decode(ids[context:])
        if len(now) > len(before) and not now.endswith("\N{REPLACEMENT CHARACTER}") or len(ids) - said > 16:
            yield now[len(before) :]
            context, said = said, len(ids)
    rest = decode(ids[context:])[len(decode(ids[context:said])) :]
    if rest:
        yield rest


def _remembered(tokens: Iterable[int], into: list[int]) -> Iterator[int]:
    for token in tokens:
        into.append(token)
        yield token


if __name__ == "__main__":
    sys.exit(main())
