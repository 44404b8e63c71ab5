"""Raw text: which files are read, and what is said about those that cannot be."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scatterfold.kernels import DataError
from scatterfold.moe.data.sources import cut, describe, find_files, kind_of, read_documents

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")


def texts(path, key="text", size=1 << 30):
    file = describe(path, path.name, kind_of(path.name, inside_folder=False))
    return [document.text for piece in cut(file, size) for document in read_documents(piece, key)]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_a_folder_in_the_order_of_names(tmp_path):
    for name in (
        "b.md",
        "a/z.txt",
        "a.txt",
        "c.jsonl",
        ".hidden.txt",
        ".git/x.py",
        "__pycache__/y.py",
        "image.png",
        "d.PY",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, skipped = find_files([str(tmp_path)])
    assert [file.name for file in files] == ["a.txt", "a/z.txt", "b.md", "c.jsonl", "d.PY"]
    assert [file.kind for file in files] == ["text", "text", "text", "jsonl", "text"]
    assert skipped == 2  # .hidden.txt and image.png; hidden folders are not entered
    assert find_files([str(tmp_path / "image.png")])[0][0].kind == "text"  # named by the user: read as text


def test_corpora_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r'nowhere does not exist, allowed: "stdlib", a file or folder of text'):
        find_files([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"holds no text, allowed: .jsonl .* .txt .md .py"):
        find_files([str(tmp_path)])
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="holds no text: all 1 files are empty"):
        find_files([str(tmp_path)])


def test_text_is_kept_as_it_is(tmp_path):
    content = "line\r\nnaïve \x00 東京\n\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert texts(tmp_path / "a.txt") == [content]


def test_invalid_utf8_names_file_and_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nth\xffree")
    with pytest.raises(DataError, match=r"a.txt line 3: byte 0xff is not valid UTF-8, allowed: UTF-8 text"):
        texts(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match="a.jsonl line 2: byte 0xe9 is not valid UTF-8"):
        texts(tmp_path / "a.jsonl")


RECORDS = [{"text": f"document {number}\n" * number, "id": number} for number in range(20)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_lines_compressed_or_not(tmp_path, suffix):
    content = lines(RECORDS)
    half = len(content) // 2
    pack = {
        ".jsonl": lambda data: data,
        ".jsonl.gz": lambda data: gzip.compress(data[:half]) + gzip.compress(data[half:]),  # several members
        ".jsonl.zst": lambda data: zstandard.compress(data[:half]) + zstandard.compress(data[half:]),
    }[suffix]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(content))
    assert texts(path) == [record["text"] for record in RECORDS]
    if suffix == ".jsonl":
        return
    path.write_bytes(pack(content)[:-9])
    with pytest.raises(DataError, match=f"a{suffix} cannot be read: .*"):
        texts(path)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(DataError, match=f"a{suffix} cannot be read: .*"):
        texts(path)


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.text(max_size=12), min_size=1, max_size=12),
    blanks=st.lists(st.integers(0, 12), max_size=3),
    size=st.integers(1, 40),
    ends=st.booleans(),
)
def test_pieces_of_a_jsonl_are_the_whole(tmp_path_factory, documents, blanks, size, ends):
    content = [json.dumps({"text": text}) for text in documents]
    for at in blanks:
        content.insert(at, "  ")
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_text("\n".join(content) + ("\n" if ends else ""))
    assert texts(path, size=size) == documents


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"line 4 is not JSON: Expecting property name .* at column 2"),
        ("[1]", r"line 4 is a JSON list, allowed: an object"),
        ('{"body": "x", "id": 3}', r"line 4 has no key 'text', allowed for data.text_key: body, id"),
        ('{"text": null}', r"line 4: 'text' is a NoneType, allowed: a string"),
        ('{"text": "\\ud800"}', r"line 4: 'text' has half a surrogate pair"),
    ],
)
@pytest.mark.parametrize("size", [1 << 30, 10])
def test_a_wrong_line_is_named_in_whole_files_and_in_pieces(tmp_path, line, message, size):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "three"}\n' + line + "\n")
    with pytest.raises(DataError, match="a.jsonl " + message):
        texts(path, size=size)


def write_parquet(path, **columns):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)


def test_parquet_rows(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"row {number}" for number in range(10)]
    write_parquet(path, body=[*rows, None], number=list(range(11)))
    assert texts(path, "body") == rows
    pieces = cut(describe(path, path.name, "parquet"), path.stat().st_size // 3)
    assert len(pieces) > 1 and texts(path, "body", size=path.stat().st_size // 3) == rows
    with pytest.raises(DataError, match=r"a.parquet has no column 'text', allowed for data.text_key: body, number"):
        texts(path)
    with pytest.raises(DataError, match=r"a.parquet: column 'number' holds int64, allowed: strings"):
        texts(path, "number")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet is not a whole parquet file: "):
        texts(path, "body")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_a_package_that_is_not_installed_is_named(tmp_path, name, monkeypatch):
    (tmp_path / name).write_bytes(b"x")
    for module in ("pyarrow", "pyarrow.parquet", "zstandard"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DataError, match=rf"{name} needs the package \w+: pip install 'scatterfold\[data\]'"):
        texts(tmp_path / name)
