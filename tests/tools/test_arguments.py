"""key=value arguments."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from scatterfold.kernels import ConfigError
from scatterfold.tools.arguments import argument, parse, usage
from scatterfold.tools.close_match import closest


@dataclass(frozen=True)
class Demo:
    """Do something."""

    EXAMPLE: ClassVar[str] = "scatterfold demo source=here"

    source: Path = argument("where from")
    count: int | None = argument("how often", default=None, least=1)
    rate: float = argument("how much", default=0.5)
    fast: bool = argument("whether to hurry", default=True)
    kind: str = argument("which", default="plain", choices=("plain", "fancy"))
    names: tuple[str, ...] = argument("who", default=())


def test_values_are_read_by_type():
    words = ["source=a=b/c", "count=3", "rate=1e-3", "fast=False", "kind=fancy", "names=[x, y]"]
    assert parse(Demo, words) == Demo(Path("a=b/c"), 3, 1e-3, False, "fancy", ("x", "y"))


def test_defaults_and_nothing():
    assert parse(Demo, ["source=x", "count=null", "names=one"]) == Demo(Path("x"), None, names=("one",))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "source is missing"),
        (["source=x", "cuont=3"], r"cuont=3 is unknown \(did you mean count\?\)"),
        (["source=x", "count=few"], "count=few has the wrong type, allowed: a whole number"),
        (["source=x", "count=0"], "count=0 is too small, allowed: 1 or more"),
        (["source=x", "rate=much"], "rate=much has the wrong type, allowed: a number"),
        (["source=x", "fast=maybe"], "fast=maybe has the wrong type, allowed: true or false"),
        (["source=x", "kind=fanzy"], r"kind=fanzy is unknown \(did you mean fancy\?\), allowed: plain, fancy"),
        (["source=x", "source=y"], "source=y is given twice"),
        (["source=x", "--count"], "'--count' is not an argument, allowed: key=value"),
    ],
)
def test_what_is_wrong_is_named(words, expected):
    with pytest.raises(ConfigError, match=expected):
        parse(Demo, words)


def test_usage_names_every_argument_and_the_example():
    text = usage(Demo)
    for part in ("Do something.", "source", "[must be given]", "(plain, fancy)", "[true]", Demo.EXAMPLE):
        assert part in text


def test_suggestions():
    keys = ["trainer.steps", "trainer.precision", "optimizer.lr", "model.width", "router.top_k", "router.jitter"]
    assert closest("trainer.stesp", keys) == "trainer.steps"
    assert closest("stesp", keys) == "trainer.steps"
    assert closest("lr", keys) == "optimizer.lr"
    assert closest("trainr.steps", keys) == "trainer.steps"
    assert closest("optimizer.width", keys) == "model.width"
    assert closest("router.topk", keys) == "router.top_k"
    assert closest("router.qqqq", keys) is None
