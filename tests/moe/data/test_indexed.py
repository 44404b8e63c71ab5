"""Damaged indexed datasets are refused before anything reads them."""

import struct

import numpy as np
import pytest

from scatterfold.kernels import DataError
from scatterfold.moe.data.indexed import HEADER, check_indexed, indexed_prefix, open_indexed
from scatterfold.moe.data.megatron import indexed_dataset_builder

DOCUMENTS = [[3, 1, 4, 9], [1, 9], [5, 9, 2, 6, 5, 9]]


def write(folder, documents=DOCUMENTS, dtype=np.uint16, name="corpus"):
    builder = indexed_dataset_builder(str(folder / f"{name}.bin"), dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(folder / f"{name}.idx"))
    return folder / name


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint16])
def test_a_whole_dataset(tmp_path, dtype):
    prefix = write(tmp_path, dtype=dtype)
    facts = check_indexed(prefix, tmp_path)
    assert (facts.documents, facts.sequences, facts.tokens, facts.largest, facts.smallest) == (3, 3, 12, 9, 0)
    files = open_indexed(prefix)
    assert files.tokens.tolist() == sum(DOCUMENTS, []) and files.offsets.tolist() == [0, 4, 6, 12]
    other = write(tmp_path, dtype=np.int64, name="copy")
    assert check_indexed(other, tmp_path).content == facts.content  # of the tokens, however stored


def test_a_check_is_kept_until_a_file_changes(prefix, tmp_path, monkeypatch):
    facts = check_indexed(prefix, tmp_path)
    monkeypatch.setattr("scatterfold.moe.data.indexed._scan", lambda files: pytest.fail("scanned again"))
    assert check_indexed(prefix, tmp_path) == facts
    monkeypatch.undo()
    write(tmp_path, [[7, 7, 8]])
    assert check_indexed(prefix, tmp_path).largest == 8


def test_a_prefix_may_be_named_in_three_ways(prefix):
    for name in (prefix, prefix.with_suffix(".bin"), prefix.with_suffix(".idx")):
        assert indexed_prefix(name) == prefix
    assert indexed_prefix(prefix.with_name("other")) is None
    prefix.with_suffix(".bin").unlink()
    with pytest.raises(DataError, match=r"corpus.bin is missing beside .*corpus.idx, allowed: both files"):
        indexed_prefix(prefix)


def patch(offset, content):
    def damage(prefix):
        file = prefix.with_suffix(".idx")
        data = bytearray(file.read_bytes())
        data[offset : offset + len(content)] = content
        file.write_bytes(data)

    return damage


def cut(suffix, size):
    def damage(prefix):
        file = prefix.with_suffix(suffix)
        file.write_bytes(file.read_bytes()[:size])

    return damage


LENGTHS = HEADER.size
POINTERS = LENGTHS + 3 * 4
ENDS = POINTERS + 3 * 8


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut(".idx", 0), r"corpus.idx is truncated: 0 bytes, expected 34 or more"),
        (cut(".idx", 20), r"corpus.idx is truncated: 20 bytes"),
        (
            cut(".idx", -4),
            r"corpus.idx is truncated or corrupt: 98 bytes, expected 102 for 3 sequences and 3 documents",
        ),
        (patch(0, b"PARQUET"), r"corpus.idx is not a Megatron index: it starts with b'PARQUET"),
        (patch(9, struct.pack("<Q", 2)), r"corpus.idx has version 2, expected 1"),
        (patch(17, b"\x63"), r"corpus.idx has token type code 99, expected one of 1 \(uint8\)"),
        (patch(17, b"\x07"), r"corpus.idx has token type code 7"),  # float32
        (patch(17, b"\x04"), r"corpus.bin is truncated or corrupt: 24 bytes, .*corpus.idx says 36"),
        (patch(18, struct.pack("<Q", 4)), r"corpus.idx is truncated or corrupt: 102 bytes, expected 114"),
        (patch(18, struct.pack("<Q", 2**60)), r"corpus.idx is truncated or corrupt"),
        (patch(18, struct.pack("<Q", 0)), r"corpus.idx is empty: 0 sequences"),
        (
            patch(LENGTHS, struct.pack("<i", 5)),
            r"corpus.idx is corrupt: its lengths sum to 13 tokens, .*corpus.bin has 12",
        ),
        (patch(LENGTHS, struct.pack("<ii", -2, 8)), r"corpus.idx is corrupt: sequence 0 has length -2"),
        (patch(POINTERS + 8, struct.pack("<q", 6)), r"corpus.idx is corrupt: sequence 1 is at byte 6, expected 8"),
        (patch(ENDS + 24, struct.pack("<q", 7)), r"documents span sequences 0 to 7, expected 0 to 3"),
        (patch(ENDS + 8, struct.pack("<q", 3)), r"corpus.idx is corrupt: document 1 ends before it starts"),
        (cut(".bin", -2), r"corpus.bin is truncated or corrupt: 22 bytes, .*corpus.idx says 24"),
        (cut(".bin", -1), r"corpus.bin is truncated or corrupt: 23 bytes"),
        (cut(".bin", 0), r"corpus.bin is truncated or corrupt: 0 bytes"),
    ],
)
def test_damage_is_named(prefix, tmp_path, damage, message):
    damage(prefix)
    with pytest.raises(DataError, match=message) as caught:
        check_indexed(prefix, tmp_path)
    assert "\n" not in str(caught.value)


def test_modes_are_allowed(prefix, tmp_path):
    file = prefix.with_suffix(".idx")
    file.write_bytes(file.read_bytes() + bytes(3))
    assert check_indexed(prefix, tmp_path).documents == 3
