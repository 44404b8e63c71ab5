"""The same weights give the same logits and the same experts in transformers and here, both ways."""

import json

import pytest

pytest.importorskip("transformers")

from scatterfold.tests.moe.interop.huggingface.reference import (  # noqa: E402
    CASES,
    assert_same_bits,
    assert_same_model,
    load,
    make,
    opened,
    save,
    values,
    weights,
    write,
)


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


def test_a_model_of_theirs_computes_the_same_here_and_back_there(case, tmp_path):
    model_type, settings = case
    theirs = make(model_type, **settings)
    source = save(theirs, tmp_path / "theirs", shards="20KB")
    assert (source / "model.safetensors.index.json").is_file()
    stored = opened(source)
    assert_same_model(theirs, stored.build())

    back = write(stored, tmp_path / "back", max_shard_bytes=20_000)
    assert json.loads((back / "config.json").read_text())["model_type"] == model_type
    assert_same_bits(weights(back), weights(source))
    again = load(back)
    assert_same_bits(again.state_dict(), theirs.state_dict())
    assert_same_model(again, stored.build())
    assert_same_bits(values(opened(back)), values(stored))
    assert opened(back).plan() == stored.plan()
