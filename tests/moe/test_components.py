"""Objects from configuration nodes, and what a reader of a config is told."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from scatterfold import ConfigError
from scatterfold.moe.components import build, check, target_of

if TYPE_CHECKING:
    from nowhere import Unknown


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Settings:
    steps: int
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    layers: tuple[int, ...] | None = None
    names: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    path: Path | None = None
    inner: Inner | None = None
    later: Unknown | None = None
    anything: Any = None
    on: bool = False


class Base:
    def __init__(self, width: int, *, scale: float = 1.0, parts: Sequence[Inner] = ()) -> None:
        self.width, self.scale, self.parts = width, scale, parts


class Inherits(Base):
    pass


class Open:
    def __init__(self, first: int, **others: Any) -> None:
        self.first, self.others = first, others


class Refuses:
    def __init__(self) -> None:
        raise ConfigError("thing.x=1 is out of range")


def make_base(width: int) -> Base:
    return Base(width)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "components_under_test", sys.modules[__name__])


def target(name):
    return f"components_under_test.{name}"


def test_values_are_converted_to_what_the_constructor_states():
    settings = check(
        Settings,
        {
            "steps": 3,
            "lr": 1,
            "betas": [0, 0.5],
            "layers": [1, 2],
            "names": ["x"],
            "weights": {"a": 1.0},
            "kind": "b",
            "path": "some/file",
            "inner": {"size": 4},
            "later": 5,
            "anything": [1],
            "on": True,
        },
        "trainer",
    )
    assert settings == Settings(
        3,
        1.0,
        (0.0, 0.5),
        (1, 2),
        ["x"],
        {"a": 1.0},
        "b",
        Path("some/file"),
        Inner(4),
        5,
        [1],
        True,  # type: ignore
    )
    assert isinstance(settings.lr, float)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({}, "trainer.steps is missing, allowed: a whole number"),
        ({"steps": 1, "stpes": 2}, "trainer.stpes=2 is not a known key, did you mean steps?; allowed: steps, lr,"),
        ({"steps": 1, "zzz": None}, "trainer.zzz=null is not a known key; allowed: steps, lr,"),
        ({"steps": 1.5}, "trainer.steps=1.5 is of the wrong type, allowed: a whole number"),
        ({"steps": True}, "trainer.steps=true is of the wrong type, allowed: a whole number"),
        ({"steps": None}, "trainer.steps=null is of the wrong type, allowed: a whole number"),
        ({"steps": 1, "lr": "1e-3"}, "trainer.lr='1e-3' is of the wrong type, allowed: a number"),
        ({"steps": 1, "on": 1}, "trainer.on=1 is of the wrong type, allowed: true or false"),
        (
            {"steps": 1, "betas": [0.9]},
            "trainer.betas=[0.9] is of the wrong type, allowed: a list of 2: a number",
        ),
        ({"steps": 1, "betas": 0.9}, "trainer.betas=0.9 is of the wrong type"),
        ({"steps": 1, "layers": [1, "x"]}, "trainer.layers[1]='x' is of the wrong type, allowed: a whole number"),
        (
            {"steps": 1, "layers": "all"},
            "trainer.layers='all' is of the wrong type, allowed: null or a list",
        ),
        ({"steps": 1, "kind": "c"}, "trainer.kind='c' is of the wrong type, allowed: a, b"),
        ({"steps": 1, "inner": {"sise": 4}}, "trainer.inner.sise=4 is not a known key, did you mean size?"),
        ({"steps": 1, "inner": 4}, "trainer.inner=4 is of the wrong type, allowed: null or a mapping"),
        (7, "trainer=7 is of the wrong type, allowed: a mapping"),
    ],
)
def test_a_mistake_names_field_value_and_what_is_allowed(node, message):
    with pytest.raises(ConfigError) as error:
        check(Settings, node, "trainer")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_build_makes_what_target_names_and_adds_what_the_program_gives():
    made = build({"_target_": target("Inherits"), "scale": 2, "parts": [{"size": 1}]}, "thing", width=8)
    assert isinstance(made, Inherits)
    assert (made.width, made.scale, made.parts) == (8, 2.0, [Inner(1)])
    assert build({"_target_": target("make_base"), "width": 3}, "thing").width == 3
    nested = check(Settings, {"steps": 1, "inner": {"_target_": target("Inner"), "size": 2}}, "trainer")
    assert nested.inner == Inner(2)
    open_ended = build({"_target_": target("Open"), "first": 1, "more": "x"}, "thing", given=2)
    assert open_ended.others == {"more": "x", "given": 2}


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (None, "thing=null names no class, allowed: a mapping with _target_"),
        ({}, "thing._target_=null names no class"),
        ({"_target_": 3}, "thing._target_=3 names no class"),
        (
            {"_target_": "no_such_package.Thing"},
            "'no_such_package.Thing' cannot be imported: there is no module",
        ),
        ({"_target_": "scatterfold.moe.routers.TopkRouter"}, "routers has no TopkRouter, did you mean TopKRouter?"),
        ({"_target_": "scatterfold.moe.nothing.Thing"}, "scatterfold.moe has no nothing"),
        ({"_target_": "scatterfold..x"}, "is not a dotted name"),
        ({"_target_": "scatterfold.__version__"}, "is not a class"),
        ({"_target_": "components_under_test.Base", "width": 1, "zzz": 1}, "thing.zzz=1 is not a known key"),
        ({"_target_": "components_under_test.Base"}, "thing.width is missing, allowed: a whole number"),
        ({"_target_": "components_under_test.Base", "width": "x" * 200}, "thing.width='xxx"),
        ({"_target_": "components_under_test.Refuses"}, "thing.x=1 is out of range"),
    ],
)
def test_a_wrong_target_is_explained(node, message):
    with pytest.raises(ConfigError) as error:
        build(node, "thing")
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


def test_what_the_program_gives_cannot_be_set_or_unknown():
    with pytest.raises(ConfigError, match="thing.width=4 cannot be set here.*allowed: scale, parts"):
        build({"_target_": target("Base"), "width": 4}, "thing", width=8)
    with pytest.raises(ConfigError, match="thing: Base does not take height"):
        build({"_target_": target("Base")}, "thing", width=8, height=1)


def test_a_broken_module_is_told_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_component.py").write_text("import package_that_is_not_installed\n")
    (tmp_path / "crashing_component.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="cannot be imported: No module named 'package_that_is_not_installed'"):
        target_of({"_target_": "broken_component.Thing"}, "thing")
    with pytest.raises(ConfigError, match="cannot be imported: RuntimeError: two lines"):
        target_of({"_target_": "crashing_component.Thing"}, "thing")


def test_target_of_names_the_class():
    assert target_of({"_target_": target("Inherits"), "width": 1}, "thing") is Inherits
