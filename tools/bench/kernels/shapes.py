"""The shapes that are measured: T tokens, D width, F expert width, E experts, K experts per token."""

from __future__ import annotations

from dataclasses import dataclass

from ....kernels import ConfigError
from ...close_match import did_you_mean


@dataclass(frozen=True)
class Shape:
    """One expert layer with SwiGLU experts, and how many tokens go through it."""

    name: str
    tokens: int
    width: int
    expert_width: int
    experts: int
    top_k: int

    @property
    def assignments(self) -> int:
        """N = T x K."""
        return self.tokens * self.top_k

    def flops(self, with_backward: bool) -> int:
        """Of the three matrices of a gated expert: 6NDF forward, twice that backward."""
        return (18 if with_backward else 6) * self.assignments * self.width * self.expert_width

    def text(self) -> str:
        """For people."""
        return f"T {self.tokens:,}, D {self.width:,}, F {self.expert_width:,}, E {self.experts}, K {self.top_k}"


CPU_SHAPES = (
    Shape("e8k2f1024", 4096, 512, 1024, 8, 2),
    Shape("e64k8f256", 4096, 512, 256, 64, 8),
    Shape("e64k8f512", 4096, 512, 512, 64, 8),
    Shape("e64k8f128", 4096, 512, 128, 64, 8),
    Shape("e64k8f512_t64", 64, 512, 512, 64, 8),
    Shape("e64k8f128_t64", 64, 512, 128, 64, 8),
    Shape("e64k8f512_t1", 1, 512, 512, 64, 8),
    Shape("e64k8f128_t1", 1, 512, 128, 64, 8),
)
# Layers of published models and of the peers' own benchmarks.
GPU_SHAPES = (
    Shape("sonic_bench", 32768, 4096, 1024, 128, 8),
    Shape("7b_fine", 24576, 1536, 256, 128, 8),
    Shape("token_rounding", 16384, 4096, 1024, 256, 8),
    Shape("qwen3_30b", 32768, 2048, 768, 128, 8),
    Shape("mixtral", 16384, 4096, 14336, 8, 2),
    Shape("olmoe", 32768, 2048, 1024, 64, 8),
    Shape("deepseek_v3_ep8", 32768, 7168, 2048, 32, 1),
    Shape("gpt_oss", 32768, 2880, 2880, 32, 4),
    Shape("qwen3_next", 32768, 2048, 512, 512, 10),
)
NAMED = {shape.name: shape for shape in (*CPU_SHAPES, *GPU_SHAPES)}


def parse_shapes(text: str, device: str) -> list[Shape]:
    """Shapes from `NAME,NAME` and `T,D,F,E,K`, separated by semicolons; those of the device for an empty text.

    Raises: ConfigError for an unknown name, numbers that are not five, or numbers that make no layer.
    """
    if not text.strip():
        return list(GPU_SHAPES if device == "cuda" else CPU_SHAPES)
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    shapes: dict[str, Shape] = {}
    for part in (part.strip() for part in inner.split(";") if part.strip()):
        words = [word.strip() for word in part.split(",") if word.strip()]
        # The name of a shape may begin with a digit, but only a number is all digits.
        found = [_from_numbers(part, words)] if words and words[0].isdigit() else [_from_name(word) for word in words]
        shapes.update((shape.name, shape) for shape in found)
    if not shapes:
        raise ConfigError(f"shapes={text} names no shape, allowed: {', '.join(NAMED)}, or T,D,F,E,K")
    return list(shapes.values())


def _from_name(word: str) -> Shape:
    name = word.lower()
    if name not in NAMED:
        suggestion = did_you_mean(name, NAMED)
        raise ConfigError(f"shapes={word} is unknown{suggestion}, allowed: {', '.join(NAMED)}, or T,D,F,E,K")
    return NAMED[name]


def _from_numbers(part: str, words: list[str]) -> Shape:
    if len(words) != 5 or not all(word.isdigit() for word in words):
        raise ConfigError(f"shapes={part} is no shape, allowed: five whole numbers T,D,F,E,K, or a name")
    tokens, width, expert_width, experts, top_k = map(int, words)
    if min(tokens, width, expert_width, experts, top_k) < 1:
        raise ConfigError(f"shapes={part} has a number below 1, allowed: T,D,F,E,K of 1 or more")
    if top_k > experts:
        raise ConfigError(f"shapes={part}: K={top_k} is larger than E={experts}, allowed: K of E or less")
    return Shape(f"t{tokens}d{width}f{expert_width}e{experts}k{top_k}", tokens, width, expert_width, experts, top_k)
