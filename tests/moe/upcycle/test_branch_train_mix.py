"""Several dense models become one MoE."""

from dataclasses import replace

import pytest
import torch

from scatterfold.kernels import ConfigError
from scatterfold.moe.upcycle import UpcycleSettings, measure, upcycle
from scatterfold.moe.upcycle.convert import method_of
from scatterfold.parallel.checkpoint.lazy import constant


def mix(**settings):
    return UpcycleSettings(method="branch_train_mix", **settings)


def test_each_source_gives_its_share_of_the_experts_and_the_rest_is_averaged(make_dense):
    sources = [make_dense(seed) for seed in (1, 2)]
    made = upcycle(sources, mix(experts=4, layers=(1,)))
    w_in = made.tensors["blocks.1.mlp.experts.w_in"].read()
    for expert, source in enumerate((0, 0, 1, 1)):
        gate = sources[source].tensors["blocks.1.mlp.w_gate.weight"].read()
        assert torch.equal(w_in[expert, 0], gate)
    for name in ("embedding.weight", "blocks.0.mlp.w_up.weight", "blocks.1.attention.wq.weight", "norm.weight"):
        one, other = (source.tensors[name].read().double() for source in sources)
        torch.testing.assert_close(made.tensors[name].read().double(), (one + other) / 2, rtol=1e-7, atol=1e-8)
    promise = method_of(sources, mix()).promise()
    assert not promise.exact and "mean of 2 sources" in promise.why


def test_equal_sources_are_sparse_upcycling(make_dense, logits):
    source = make_dense(3)
    made = upcycle([source] * 4, mix())
    sparse = upcycle([source], UpcycleSettings())
    assert made.tensors.keys() == sparse.tensors.keys()
    for name, tensor in made.tensors.items():
        torch.testing.assert_close(tensor.read(), sparse.tensors[name].read(), rtol=1e-6, atol=1e-8)
    assert float((logits(made) - logits(source)).abs().max()) < 1e-5 * float(logits(source).abs().max())


def test_bfloat16_is_averaged_in_float32(make_dense):
    """One and eight 2^-9: summed in bfloat16 they would stay one."""
    dense = make_dense()

    def with_norm(value):
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in dense.tensors.items()}
        return dense.with_model(dense.config, {**tensors, "norm.weight": constant(value, (16,), torch.bfloat16)})

    sources = [with_norm(1.0), *(with_norm(2**-9) for _ in range(7))]
    made = upcycle(sources, mix()).tensors["norm.weight"].read()
    assert made.dtype == torch.bfloat16
    expected = torch.tensor((1 + 7 * 2**-9) / 8).to(torch.bfloat16)
    assert expected != torch.tensor(1 / 8).to(torch.bfloat16) and torch.equal(made, expected.expand(16))


def test_the_receipt_has_a_line_for_each_source(make_dense, logits):
    sources = [make_dense(seed) for seed in (1, 2)]
    made = upcycle(sources, mix())
    measured = measure(sources, made, tokens=20)
    assert [difference.source for difference in measured.sources] == ["dense-1", "dense-2"]
    assert all(difference.relative > 0.01 for difference in measured.sources) and not measured.exact


def test_models_that_do_not_fit_each_other_are_refused(make_dense):
    first = make_dense()
    with pytest.raises(
        ConfigError, match=r"dense-0 has model.width=32, but dense-0 has 16, allowed: models of one shape"
    ):
        upcycle([first, make_dense(width=32)], mix())
    with pytest.raises(ConfigError, match="model.vocab_size=40"):
        upcycle([first, make_dense(vocab_size=40)], mix())
    with pytest.raises(ConfigError, match=r"experts=8 is not a multiple of the 3 sources, allowed: a multiple"):
        upcycle([first] * 3, mix())
    with pytest.raises(ConfigError, match=r"2 models are too many for method=sparse, allowed: one"):
        upcycle([first] * 2, UpcycleSettings())


def test_models_of_another_tokenizer_are_refused(make_dense):
    class Words:
        vocab_size, eod = 37, 0

        def __init__(self, digest):
            self.digest = digest

        def spec(self):
            return {"kind": "hf", "path": f"/models/{self.digest}", "sha256": self.digest}

    sources = [replace(make_dense(), tokenizer=Words(digest)) for digest in ("a", "b")]
    with pytest.raises(ConfigError, match="has another tokenizer than"):
        upcycle(sources, mix())
