"""Text generation, one token at a time, with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..kernels import ConfigError
from .blocks import KeyValueCache
from .models.transformer import Transformer


def generate(
    model: Transformer,
    prompt_tokens: Sequence[int],
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Continue a prompt; yields each new token as soon as it is known.

    The model sees at most `model.config.max_positions` tokens. Of a longer prompt it sees the newest; when the text
    outgrows the window, the newest half of it is kept and read again, so that the cost of reading again is spread over
    half a window of tokens.

    Args:
        model: in any mode; put into evaluation mode while it runs.
        prompt_tokens: at least one token.
        max_tokens: most tokens to make.
        temperature: divides the logits; 0 for always the likeliest token (the lowest id of equals).
        top_p: sample from the fewest likeliest tokens whose probabilities sum to it (1904.09751).
        seed: of the sampling.
        stop: a token after which to stop; it is not yielded.

    Raises: ConfigError for a value out of range, before the first token.
    """
    if not prompt_tokens:
        raise ConfigError("prompt is empty, allowed: at least one token")
    wrong = [token for token in prompt_tokens if not 0 <= token < model.config.vocab_size]
    if wrong:
        raise ConfigError(f"prompt token {wrong[0]} is unknown, allowed: 0 to {model.config.vocab_size - 1}")
    if max_tokens < 0:
        raise ConfigError(f"max_tokens={max_tokens} is negative, allowed: 0 or more")
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature} is out of range, allowed: 0 or more")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} is out of range, allowed: above 0, at most 1")
    return _generate(model, list(prompt_tokens), max_tokens, temperature, top_p, seed, stop)


def _generate(
    model: Transformer,
    tokens: list[int],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: int | None,
) -> Iterator[int]:
    window = model.config.max_positions
    unread = tokens[-window:]
    cache = KeyValueCache(model.config.layers)
    random = torch.Generator().manual_seed(seed)
    for _ in range(max_tokens):
        if cache.length + len(unread) > window:
            cache = KeyValueCache(model.config.layers)
            unread = tokens[-max(1, window // 2) :]
        token = _choose(_next_logits(model, unread, cache), temperature, top_p, random)
        if token == stop:
            return
        yield token
        tokens.append(token)
        unread = [token]


@torch.inference_mode()
def _next_logits(model: Transformer, tokens: list[int], cache: KeyValueCache) -> Tensor:
    """Logits of the token after these, (V,) float32 on the CPU."""
    was_training = model.training
    model.eval()
    device = model.head_weight.device
    hidden = model.hidden(torch.tensor([tokens], device=device), cache=cache)
    logits = model.logits(hidden[0, -1]).float().cpu()
    model.train(was_training)
    return logits


def _choose(logits: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probs, token = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    better = probs.cumsum(-1) - probs
    probs = probs.masked_fill(better >= top_p, 0.0)  # the likeliest always stays
    return int(token[torch.multinomial(probs, 1, generator=random)])
