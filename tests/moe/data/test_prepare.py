"""Preparing: the same bytes however it is done, and never half a dataset."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scatterfold.kernels import ConfigError, DataError
from scatterfold.moe.data import ByteTokenizer, PrepareSettings, prepare
from scatterfold.moe.data.megatron import open_indexed_dataset
from scatterfold.moe.data.pool import light

PREPARE = sys.modules["scatterfold.moe.data.prepare"]  # the package's attribute of this name is the function


@pytest.fixture
def corpus(tmp_path):
    """A tree of 120 text files and a jsonl, some documents empty, two of them equal."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for number in range(120):
        (folder / ("deep" if number % 3 else "") / f"{number:03}.txt").write_text(
            f"file {number} naïve\n" * (number % 7)
        )
    records = [f"line {number} " * (number % 5 + 1) for number in range(60)]
    (folder / "lines.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*records, "line 3 " * 4])
    )
    return folder


def run(corpus, output, **options):
    return prepare(PrepareSettings(source=(str(corpus),), output=str(output), **{"workers": 1, **options}))


def contents(prefix):
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def expected_documents(corpus):
    """In the order of the source."""
    paths = sorted((path for path in corpus.rglob("*.*")), key=lambda path: path.relative_to(corpus).as_posix())
    found = []
    for path in paths:
        if path.suffix == ".jsonl":
            found += [json.loads(line)["text"] for line in path.read_text().splitlines()]
        else:
            found.append(path.read_text())
    return [text for text in found if text]


def stored_documents(prefix):
    dataset = open_indexed_dataset(str(prefix))
    tokenizer = ByteTokenizer()
    documents = [dataset[index].tolist() for index in range(len(dataset))]
    assert all(document[-1] == tokenizer.eod and tokenizer.eod not in document[:-1] for document in documents)
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [tokenizer.decode(document) for document in documents]


def test_round_trip_through_megatrons_reader(corpus, tmp_path):
    receipt = run(corpus, tmp_path / "out" / "set", shuffle=False)
    documents = expected_documents(corpus)
    assert stored_documents(tmp_path / "out" / "set") == documents
    assert receipt.documents == receipt.sequences == len(documents)
    assert receipt.empty_documents == 18 and receipt.text_bytes == len("".join(documents).encode())
    assert receipt.tokens == receipt.text_bytes + receipt.documents
    assert json.loads((tmp_path / "out" / "set.json").read_text()) == receipt.record()
    assert receipt.bin_sha256 == hashlib.sha256((tmp_path / "out" / "set.bin").read_bytes()).hexdigest()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["set.bin", "set.idx", "set.json"]


def test_shuffling_is_by_content_and_keeps_equal_documents_together(corpus, tmp_path):
    run(corpus, tmp_path / "set")
    stored = stored_documents(tmp_path / "set")
    in_order = expected_documents(corpus)
    assert stored != in_order and sorted(stored) == sorted(in_order)
    first, second = [index for index, text in enumerate(stored) if text == "line 3 " * 4]
    assert second == first + 1
    numbers = [in_order.index(text) for text in stored]
    assert abs(np.corrcoef(numbers, range(len(numbers)))[0, 1]) < 0.3
    renamed = corpus.rename(corpus.with_name("renamed"))
    (renamed / "000.txt").rename(renamed / "zzz.txt")
    run(renamed, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(tmp_path / "set")


def test_the_same_bytes_for_any_number_of_workers_and_any_shards(corpus, tmp_path):
    one = run(corpus, tmp_path / "one")
    three = run(corpus, tmp_path / "three", workers=3, shard_bytes=700)
    many = run(corpus, tmp_path / "many", workers=1, shard_bytes=100)
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "many")
    assert one.bin_sha256 == three.bin_sha256 == many.bin_sha256 and one.documents == three.documents


KILLED = light("""
import os, signal, sys
from scatterfold.moe.data.prepare import PrepareSettings, prepare

def progress(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(PrepareSettings(source=(sys.argv[1],), output=sys.argv[2], workers=int(sys.argv[3]), shard_bytes=300), progress)
""")


def wait_until_gone(marker):
    """Wait for the processes that have the marker in their environment."""
    for _ in range(200):
        alive = [path for path in Path("/proc").glob("[0-9]*/environ") if marker.encode() in read(path)]
        if not alive:
            return
        time.sleep(0.05)
    pytest.fail(f"still there: {alive}")


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_where_it_was(corpus, tmp_path, workers):
    command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "set"), str(workers)]
    marker = f"{os.getpid()}-{time.time_ns()}"
    killed = subprocess.run(command, env={**os.environ, "SCATTERFOLD_TEST": marker}, check=False)
    assert killed.returncode == -signal.SIGKILL
    wait_until_gone(marker)  # the workers end by themselves
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".idx", ".json")]
    shards = set((tmp_path / "set.partial").glob("*.npz"))
    assert shards
    seen = []
    settings = PrepareSettings(source=(str(corpus),), output=str(tmp_path / "set"), workers=1, shard_bytes=300)
    prepare(settings, lambda done, total: seen.append((done, total)))
    assert 0 < seen[0][0] < seen[0][1]  # it started with what had been done
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    run(corpus, tmp_path / "whole")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert not (tmp_path / "set.partial").exists()


def test_a_finished_dataset_is_not_made_again_and_not_overwritten(corpus, tmp_path):
    first = run(corpus, tmp_path / "set")
    before = (tmp_path / "set.bin").stat().st_mtime_ns
    assert run(corpus, tmp_path / "set", workers=2) == first
    assert (tmp_path / "set.bin").stat().st_mtime_ns == before
    with pytest.raises(
        DataError, match=r"output=.*set holds a dataset of other sources or options, allowed: remove it"
    ):
        run(corpus, tmp_path / "set", shuffle=False)
    (corpus / "new.txt").write_text("more")
    with pytest.raises(DataError, match="other sources or options"):
        run(corpus, tmp_path / "set")
    assert (tmp_path / "set.bin").stat().st_mtime_ns == before


def test_a_file_of_another_program_is_not_overwritten(corpus, tmp_path):
    (tmp_path / "set.bin").write_bytes(b"weights")
    with pytest.raises(DataError, match=r"set.bin exists without an .idx, allowed: remove it or choose another"):
        run(corpus, tmp_path / "set")
    assert (tmp_path / "set.bin").read_bytes() == b"weights"


def test_an_interrupt_ends_the_workers_and_keeps_whole_shards(corpus, tmp_path):
    seen = []

    def progress(done, total):
        seen.append(done)
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(PrepareSettings((str(corpus),), str(tmp_path / "set"), workers=2, shard_bytes=300), progress)
    assert list(tmp_path.glob("set.partial/*.npz")) and not list(tmp_path.glob("set.partial/.*"))
    run(corpus, tmp_path / "set", shard_bytes=300)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_document_leaves_only_whole_shards_which_are_used_again(corpus, tmp_path, workers):
    (corpus / "zz.txt").write_bytes(b"fine\nnot \xff fine")
    with pytest.raises(DataError, match=r"zz.txt line 2: byte 0xff is not valid UTF-8"):
        run(corpus, tmp_path / "set", shard_bytes=5000, workers=workers)
    assert {path.name for path in tmp_path.iterdir()} <= {"corpus", "set.partial"}
    kept = [path.name for path in tmp_path.glob("set.partial/*") if path.is_file()]
    assert kept or workers == 2  # with two, the bad one may be found before any is done
    assert all(name.endswith((".bin", ".npz")) and not name.startswith(".") for name in kept)
    (corpus / "zz.txt").write_text("fine now")
    run(corpus, tmp_path / "set", shard_bytes=5000)
    assert "fine now" in stored_documents(tmp_path / "set")


def test_a_corpus_that_fails_at_once_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not valid UTF-8"):
        run(tmp_path / "a.txt", tmp_path / "set")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="holds no text: every document is empty"):
        run(tmp_path / "b.jsonl", tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.jsonl"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full, allowed: a folder with more space"),
        (errno.EACCES, "no permission to write, allowed: a writable folder"),
        (errno.EIO, "Input/output error, allowed: a writable folder"),
    ],
)
@pytest.mark.parametrize("nth", [1, 3, -1])
def test_a_disk_that_refuses_leaves_nothing(corpus, tmp_path, monkeypatch, code, message, nth):
    calls = 0

    def refuse(path):
        nonlocal calls
        calls += 1
        if calls == nth or (nth == -1 and path.name == "merged.bin"):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("scatterfold.moe.data.worker.flush", refuse)
    monkeypatch.setattr(PREPARE, "flush", refuse)
    with pytest.raises(DataError, match=f"output=.*set cannot be written: {message}"):
        run(corpus, tmp_path / "set", shard_bytes=3000)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


FULL = light("""
import resource, sys
from scatterfold.kernels.errors import DataError
from scatterfold.moe.data.prepare import PrepareSettings, prepare

resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    prepare(PrepareSettings(source=(sys.argv[1],), output=sys.argv[2], workers=int(sys.argv[3]), shard_bytes=4000))
except DataError as error:
    print(error)
    sys.exit(2)
""")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_write_that_really_fails(corpus, tmp_path, workers):
    command = [sys.executable, "-c", FULL, str(corpus), str(tmp_path / "set"), str(workers)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stdout == f"output={tmp_path}/set cannot be written: File too large, allowed: a writable folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_an_output_below_a_file_or_on_no_file_system(corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written: Not a directory"):
        run(corpus, tmp_path / "file" / "set")
    with pytest.raises(DataError, match="cannot be written: "):
        run(corpus, "/proc/scatterfold/set")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission(corpus, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match="cannot be written: no permission to write, allowed: a writable folder"):
        run(corpus, tmp_path / "locked" / "set")


def test_a_worker_that_dies_is_an_error(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("scatterfold.moe.data.pool.PROGRAM", "import sys; sys.exit(3)")
    with pytest.raises(DataError, match="a worker process ended with code 3 before its work was done"):
        run(corpus, tmp_path / "set", workers=2, shard_bytes=500)


def test_few_documents_are_stored_in_parts_that_a_split_can_cut(tmp_path):
    text = "".join(f"sentence {number}. " for number in range(4000))
    (tmp_path / "book.txt").write_text(text)
    receipt = run(tmp_path / "book.txt", tmp_path / "set")
    dataset = open_indexed_dataset(str(tmp_path / "set"))
    assert receipt.documents == 1 and 100 <= receipt.sequences == len(dataset) <= 102
    tokens = np.concatenate([dataset[index] for index in range(len(dataset))])
    assert ByteTokenizer().decode(tokens) == text and (tokens == 256).sum() == 1


def test_wrong_settings():
    with pytest.raises(ConfigError, match="workers=0 is too small"):
        PrepareSettings(source=("a",), output="b", workers=0)
    with pytest.raises(ConfigError, match="output='b/' is wrong, allowed: a prefix"):
        PrepareSettings(source=("a",), output="b/")
    with pytest.raises(ConfigError, match="names no corpus"):
        PrepareSettings(source=(), output="b")


def test_workers_do_without_torch():
    program = light("from scatterfold.moe.data.worker import main; import sys; print('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
