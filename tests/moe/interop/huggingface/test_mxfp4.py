"""MXFP4 against the definition of its bits, transformers' own dequantiser, and its own model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from scatterfold.moe.interop.huggingface.mxfp4 import dequantise, dequantised  # noqa: E402
from scatterfold.parallel.checkpoint.lazy import LazyTensor, in_memory  # noqa: E402
from scatterfold.tests.moe.interop.huggingface.reference import (  # noqa: E402
    CASES,
    assert_same_model,
    make,
    opened,
    save,
    weights,
    write,
)

SETTINGS = {**CASES["gpt_oss"][1], "intermediate_size": 64}


def value_of(bits):
    """E2M1: sign, exponent with bias 1, mantissa; subnormal where the exponent is zero."""
    sign, exponent, mantissa = -1.0 if bits >> 3 else 1.0, bits >> 1 & 3, bits & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def random_blocks(experts, rows, columns, seed=0, scales=(110, 130)):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(*scales, (experts, rows, columns // 32), generator=generator).to(torch.uint8)


def test_every_value_of_four_bits():
    pairs = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = dequantise(pairs, torch.full((1, 1, 16), 127, dtype=torch.uint8)).flatten().tolist()
    assert found == [value_of(bits) for byte in range(256) for bits in (byte & 15, byte >> 4)]
    assert sorted({abs(value) for value in found}) == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_every_scale():
    scales = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    found = dequantise(torch.full((1, 1, 256, 16), 0x72, dtype=torch.uint8), scales).view(256, 32)  # 1 and 6
    assert found[255].isnan().all()
    for scale in range(253):  # 6 * 2^126 is the largest that bfloat16 holds
        assert found[scale, 0] == 2.0 ** (scale - 127) and found[scale, 1] == 6 * 2.0 ** (scale - 127), scale


def test_the_same_as_transformers():
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks, scales = random_blocks(3, 10, 96)
    theirs = convert(blocks, scales)  # (E, columns, rows): transposed to what its class computes with
    assert torch.equal(dequantise(blocks, scales), theirs.transpose(1, 2))


def test_a_part_reads_the_blocks_that_it_touches():
    blocks, scales = random_blocks(3, 10, 96)
    read = []

    def watched(tensor):
        def fetch(index):
            read.append(tensor[index].numel())
            return tensor[index].clone()

        return LazyTensor(tensor.shape, tensor.dtype, fetch)

    whole = dequantised(in_memory(blocks), in_memory(scales)).read()
    assert whole.shape == (3, 10, 96) and whole.dtype == torch.bfloat16
    lazy = dequantised(watched(blocks), watched(scales))
    part = lazy.read([slice(1, 2), slice(4, 7), slice(40, 70)])
    assert torch.equal(part, whole[1:2, 4:7, 40:70])
    assert read == [3 * 2 * 16, 3 * 2]
    assert lazy.read([slice(0, 0), slice(0, 10), slice(0, 96)]).shape == (0, 10, 96)


def quantised(folder, model):
    """Replace the experts of a saved model by random ones in MXFP4; and in the model, as transformers dequantises."""
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    held = load_file(folder / "model.safetensors")
    for layer in range(3):
        for seed, (part, rows, columns) in enumerate((("gate_up_proj", 128, 32), ("down_proj", 32, 64))):
            key = f"model.layers.{layer}.mlp.experts.{part}"
            blocks, scales = random_blocks(6, rows, columns, 2 * layer + seed, scales=(122, 126))
            model.state_dict()[key].copy_(convert(blocks, scales))
            del held[key]
            held |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": method}))


def test_a_quantised_model_is_read_and_written_in_bfloat16(tmp_path):
    theirs = make("gpt_oss", torch.bfloat16, **SETTINGS)
    folder = save(theirs, tmp_path / "quantised")
    with torch.no_grad():
        quantised(folder, theirs)
    stored = opened(folder)
    wide = make("gpt_oss", **SETTINGS)
    wide.load_state_dict(theirs.state_dict())
    assert_same_model(wide, stored.build())
    back = write(stored, tmp_path / "back")
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    state = theirs.state_dict()
    for key, tensor in weights(back).items():
        assert torch.equal(tensor, state[key]), key
