"""Data settings: what is wrong is named."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scatterfold.kernels import ConfigError
from scatterfold.moe.data import DataSettings
from scatterfold.moe.data.settings import corpora, split_shares


def test_ways_to_name_corpora():
    assert corpora("a") == [("a", None)]
    assert corpora(["a", "b"]) == [("a", None), ("b", None)]
    assert corpora({"a": 1, "b": 0.5}) == [("a", 1.0), ("b", 0.5)]
    assert corpora([{"path": "a", "weight": 3}, {"path": "b", "weight": 1}]) == [("a", 3.0), ("b", 1.0)]
    assert corpora({"path": "a", "weight": 2}) == [("a", 2.0)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "data.path=null names no corpus"),
        ([], "names no corpus"),
        ("", "names no corpus"),
        ([3], "names no corpus"),
        ([{"path": "a", "wieght": 1}], "unknown key 'wieght', allowed: path, weight"),
        ([{"path": "a", "weight": 1}, "b"], "gives b no weight"),
        ({"a": 0}, "weight=0 of a is out of range, allowed: a number above 0"),
        ({"a": "much"}, "weight='much' of a"),
        ({"a": float("inf")}, "weight=inf of a"),
    ],
)
def test_wrong_corpora(path, message):
    with pytest.raises(ConfigError, match=message):
        DataSettings(path=path)


@pytest.mark.parametrize(
    "options",
    [{"sequence_length": 1}, {"global_batch_size": 0}, {"micro_batch_size": 0}, {"workers": 0}, {"prefetch": -1}],
)
def test_numbers_that_are_too_small(options):
    (name, value), *_ = options.items()
    with pytest.raises(ConfigError, match=f"data.{name}={value} is too small, allowed: "):
        DataSettings(**options)


@pytest.mark.parametrize("split", ["", "95", "a,b", "1,2,3,4", "0,1", "1,0", "1,-1", "1,nan", "inf,1"])
def test_wrong_splits(split):
    with pytest.raises(ConfigError, match=r"data.split=.* is wrong, allowed: shares of train, valid"):
        DataSettings(split=split)


@given(st.lists(st.floats(0.01, 1e6), min_size=2, max_size=3))
def test_shares_sum_to_one(numbers):
    shares = split_shares(",".join(map(str, numbers)))
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] / shares[1] == pytest.approx(numbers[0] / numbers[1])


def test_the_config_files_have_every_field_and_no_other():
    folder = Path(__file__).parents[3] / "configs" / "data"
    fields = {field.name for field in dataclasses.fields(DataSettings)}
    values = yaml.safe_load((folder / "stdlib.yaml").read_text())
    assert set(values) == fields
    assert DataSettings(**values).path == "stdlib"
    for path in folder.glob("*.yaml"):
        assert path.read_text().startswith("# ")
        assert set(yaml.safe_load(path.read_text())) <= fields | {"defaults"}
