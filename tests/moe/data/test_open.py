"""Opening data: one order of samples for any world size, any number of steps, any resume."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from scatterfold.kernels import ConfigError, DataError
from scatterfold.moe.data import DataSettings, PrepareSettings, measure_baselines, open_data, prepare
from scatterfold.moe.data import corpus as corpora
from scatterfold.moe.data.batches import MASKED
from scatterfold.moe.data.cache import cache_folder
from scatterfold.moe.data.megatron import blending_indices, one_epoch_dataset, open_indexed_dataset

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away"]


def write_corpus(folder, documents=150, seed=0):
    random = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(documents):
        words = random.choice(WORDS, size=random.integers(3, 40))
        (folder / f"{number:03}.txt").write_text(f"{seed}:{number} " + " ".join(words) + "\n")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two corpora of text and a cache."""
    home = tmp_path_factory.mktemp("data")
    write_corpus(home / "one")
    write_corpus(home / "two", 120, seed=1)
    return home


def options(home, **changes):
    fields = {"path": str(home / "one"), "sequence_length": 16, "global_batch_size": 8, "micro_batch_size": 2}
    return DataSettings(**{**fields, "cache_dir": str(home / "cache"), "workers": 1, "prefetch": 0, **changes})


def read(data, steps):
    """All rows of this rank in the given steps, tokens and labels."""
    batches = [batch for step in steps for batch in data.train.step(step)]
    return torch.stack([torch.cat([batch.tokens, batch.labels], dim=1) for batch in batches]).flatten(0, 1)


@pytest.mark.parametrize("path", ["one", "blend"])
def test_the_global_batch_is_the_same_for_any_world_size(home, path):
    changes = {"path": {str(home / "one"): 2, str(home / "two"): 1}} if path == "blend" else {}
    alone = open_data(options(home, **changes), seed=3)
    for world in (2, 4):
        ranks = [open_data(options(home, **changes), rank, world, seed=3) for rank in range(world)]
        for step in (0, 1, 40):
            together = torch.cat([read(data, [step]) for data in ranks])
            assert torch.equal(together, read(alone, [step]))
        assert all(data.train.tokens_per_step == 8 * 16 for data in ranks)


def test_resuming_equals_going_on_and_micro_batches_change_nothing(home):
    whole = read(open_data(options(home, prefetch=2), seed=3), range(60))
    resumed = read(open_data(options(home, micro_batch_size=8), seed=3), range(35, 60))
    assert torch.equal(whole[35 * 8 :], resumed)
    assert not torch.equal(whole, read(open_data(options(home), seed=4), range(60)))


def test_two_epochs_cover_every_sample_once_each(home):
    data = open_data(options(home, global_batch_size=1, micro_batch_size=1), seed=3)
    count = data.description["corpora"][0]["samples_per_epoch"]
    epochs = [read(data, range(start, start + count)) for start in (0, count)]
    train = data.train_tokens.read(0, len(data.train_tokens))
    for epoch in epochs:
        labels = epoch[:, 16:].flatten().numpy()
        left_out = len(train) - len(labels)  # the first token, which nothing predicts, and less than a row at the end
        assert 1 <= left_out <= 16
        missing = np.bincount(train, minlength=257) - np.bincount(labels, minlength=257)
        assert missing.min() >= 0 and missing.sum() == left_out
        assert torch.equal(epoch[:, 1:16], epoch[:, 16:-1])  # labels are the tokens that follow
    assert not torch.equal(*epochs)
    indices = data.train._sample.__self__._epoch(1).shuffle_index
    assert sorted(indices.tolist()) == list(range(count))


def test_an_epoch_is_megatrons_own(home, tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    from scatterfold.moe.data.megatron_epochs import TokenizerFacts

    data = open_data(options(home), seed=5)
    prefix = str(next((home / "cache" / "prepared").glob("one-*.idx"))).removesuffix(".idx")
    config = GPTDatasetConfig(
        random_seed=corpora.epoch_seed(5, 0),
        sequence_length=16,
        blend=([prefix], None),
        split="1",
        path_to_cache=str(tmp_path),
        tokenizer=TokenizerFacts(257, 256),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = open_indexed_dataset(prefix)
    train = np.arange(round(0.95 * len(dataset)))
    reference = GPTDataset(dataset, prefix, train, None, Split.train, config)
    ours = read(data, range(len(reference) // 8))
    for index, row in enumerate(ours):
        assert torch.equal(row[:16], reference[index]["tokens"]) and torch.equal(row[16:], reference[index]["labels"])


def test_a_large_index_is_kept_on_disk_and_says_the_same(home, tmp_path, monkeypatch):
    in_memory = read(open_data(options(home), seed=6), range(30))
    monkeypatch.setattr("scatterfold.moe.data.megatron_epochs.IN_MEMORY_SAMPLES", 0)
    cache = {"cache_dir": str(tmp_path)}
    ranks = [open_data(options(home, global_batch_size=8, micro_batch_size=4, **cache), r, 2, seed=6) for r in range(2)]
    with ThreadPoolExecutor(2) as threads:  # both want to build the index at once
        first, second = threads.map(lambda data: [read(data, [step]) for step in range(30)], ranks)
    together = torch.cat([rows for pair in zip(first, second) for rows in pair])
    assert torch.equal(together, in_memory)
    kept = [path for path in (tmp_path / "indices").iterdir() if path.name != "locks"]
    assert kept and all(sorted(part.name for part in path.iterdir())[0] == "document.npy" for path in kept)


def test_a_blend_has_its_proportions_at_every_length(home):
    weights = {str(home / "one"): 0.7, str(home / "two"): 0.3}
    data = open_data(options(home, path=weights, global_batch_size=100, micro_batch_size=100), seed=1)
    rows = read(data, range(10))
    marks = torch.zeros(len(rows), dtype=torch.long)  # documents of one start with "0:", those of two with "1:"
    blend = data.train._sample.__self__
    for number in range(len(rows)):
        marks[number] = blend.locate(number)[0]
    for count in (10, 100, 1000):
        assert abs(int(marks[:count].sum()) - 0.3 * count) <= 1
    for number in (0, 7, 999):
        corpus, sample = blend.locate(number)
        assert rows[number][:16].tolist() == blend.corpora[corpus].sample(sample)[0].tolist()


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=5), number=st.integers(0, 10**9))
def test_a_position_of_a_blend_is_found_without_counting(weights, number):
    blend = corpora.Blend.__new__(corpora.Blend)
    blend.corpora = weights
    blend._corpus, blend._sample = blending_indices(weights, corpora.BLEND_CYCLE)
    blend._per_cycle = np.bincount(blend._corpus, minlength=len(weights))
    seen = [0] * len(weights)
    for position in range(300):
        corpus, sample = blend.locate(position)
        assert sample == seen[corpus]
        seen[corpus] += 1
    corpus, sample = blend.locate(number)
    expected = weights[corpus] / sum(weights) * number
    assert sample == pytest.approx(expected, rel=1e-3, abs=2)


def test_a_blend_goes_on_into_further_cycles_without_a_gap(home, monkeypatch):
    monkeypatch.setattr(corpora, "BLEND_CYCLE", 10)
    data = open_data(options(home, path={str(home / "one"): 2, str(home / "two"): 1}), seed=1)
    blend = data.train._sample.__self__
    samples = [[sample for corpus, sample in map(blend.locate, range(95)) if corpus == which] for which in (0, 1)]
    assert samples == [list(range(len(samples[0]))), list(range(len(samples[1])))]


def test_a_weight_that_would_never_be_read(home):
    with pytest.raises(ConfigError, match=r"two has 1e-09 of all weight, allowed: 2.38e-07 or more"):
        open_data(options(home, path={str(home / "one"): 1, str(home / "two"): 1e-9}))


def test_a_small_weight_is_kept(home):
    data = open_data(options(home, path={str(home / "one"): 1, str(home / "two"): 1e-5}))
    blend = data.train._sample.__self__
    assert blend._per_cycle[1] / blend._per_cycle.sum() == pytest.approx(1e-5, rel=0.1)


def test_weights_default_to_sizes(home):
    data = open_data(options(home, path=[str(home / "one"), str(home / "two")]))
    shares = [(corpus["weight"], corpus["samples_per_epoch"]) for corpus in data.description["corpora"]]
    total = sum(samples for _, samples in shares)
    assert [weight for weight, _ in shares] == pytest.approx([samples / total for _, samples in shares])
    json.dumps(data.description)


def test_validation_is_the_rest_and_counts_every_byte(home):
    data = open_data(options(home), seed=3)
    text = [path.read_text() for path in sorted((home / "one").iterdir())]
    train, valid = data.train_text().decode(), data.valid_text().decode()
    assert sorted((train + valid).splitlines()) == sorted("".join(text).splitlines())
    assert len(valid.splitlines()) == 150 - round(150 * 0.95)
    for world in (1, 3):
        found, num_bytes = [], 0
        for rank in range(world):
            for batch in open_data(options(home, global_batch_size=6), rank, world).valid_batches(None):
                found += batch.labels[batch.labels != MASKED].tolist()
                num_bytes += batch.num_bytes
        assert num_bytes == len(valid.encode())
        assert sorted(found) == sorted(data.valid_tokens.read(0, len(data.valid_tokens)).tolist())
    names = measure_baselines(data)
    assert names["trigram"] < names["unigram"] < 8


def test_packed_rows_are_cut_at_documents(home):
    packed, joined = (open_data(options(home, pack_documents=pack)).train.step(2) for pack in (True, False))
    for left, right in zip(packed, joined):
        assert torch.equal(left.tokens, right.tokens)
        assert right.cu_seqlens.tolist() == [0, 16, 32]
        starts = {0, 16, *torch.nonzero(left.tokens.flatten() == 256).flatten().tolist()}
        assert left.cu_seqlens.tolist() == [*sorted(starts), 32]


def test_a_single_file_is_split_too(tmp_path):
    text = "".join(f"{number} {WORDS[number % 11]}\n" for number in range(3000))
    (tmp_path / "book.txt").write_text(text)
    data = open_data(options(tmp_path, path=str(tmp_path / "book.txt"), cache_dir=str(tmp_path / "cache")))
    assert data.train_text() + data.valid_text() == text.encode()
    assert 0.03 < len(data.valid_text()) / len(text) < 0.07


def test_raw_text_is_prepared_once_by_whoever_comes_first(home, tmp_path):
    asked = options(home, cache_dir=str(tmp_path / "cache"))
    prepared = []

    def progress(done, total):
        prepared.append(done)

    with ThreadPoolExecutor(3) as threads:
        ranks = list(threads.map(lambda rank: open_data(asked, rank, 4, progress=progress), range(3)))
    assert len({data.description["corpora"][0]["content"] for data in ranks}) == 1
    assert prepared.count(0) == 1  # one of them began
    assert len(list((tmp_path / "cache" / "prepared").glob("*.idx"))) == 1
    open_data(asked, progress=lambda done, total: pytest.fail("prepared again"))


def test_a_changed_file_is_prepared_again(tmp_path):
    folder = write_corpus(tmp_path / "one")
    before = open_data(options(tmp_path)).description["corpora"][0]["content"]
    (folder / "000.txt").write_text("something else entirely")
    assert open_data(options(tmp_path)).description["corpora"][0]["content"] != before


def test_the_standard_library(home):
    data = open_data(DataSettings(cache_dir=str(home / "cache"), sequence_length=64, global_batch_size=2))
    train, valid = data.train_text(), data.valid_text()
    assert len(train) + len(valid) > 10_000_000
    assert 0.02 < len(valid) / len(train) < 0.12
    train.decode(), valid.decode()
    assert b"class OrderedDict" in train + valid and b"Python Character Mapping Codec" not in valid
    again = open_data(DataSettings(cache_dir=str(home / "cache2"), sequence_length=64, global_batch_size=2))
    assert again.description == data.description


def save_tokenizer(path, words=WORDS):
    vocabulary = {"[UNK]": 0, "</s>": 1} | {word: 2 + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(path))
    return str(path)


def test_an_indexed_dataset_and_its_tokenizer(home, tmp_path):
    tokenizer = save_tokenizer(tmp_path / "words.json")
    asked = {"source": (str(home / "one"),), "tokenizer": tokenizer, "shard_bytes": 4000}
    one = prepare(PrepareSettings(output=str(tmp_path / "set"), workers=1, **asked))
    two = prepare(PrepareSettings(output=str(tmp_path / "two"), workers=2, **asked))
    assert one.bin_sha256 == two.bin_sha256 and one.tokenizer["eod"] == "</s>"
    for path in ("set", "set.bin", "set.idx"):
        data = open_data(options(home, path=str(tmp_path / path), tokenizer=tokenizer))
        assert data.description["vocab_size"] == 14 and data.tokenizer.eod == 1
    assert (data.train.step(0)[0].tokens == 1).any()
    smaller = save_tokenizer(tmp_path / "few.json", WORDS[:5])
    with pytest.raises(DataError, match=r"set was made with another tokenizer: it holds token id 13, .* allows 0 to 6"):
        open_data(options(home, path=str(tmp_path / "set"), tokenizer=smaller))
    with pytest.raises(DataError, match=r"set has no end-of-document token \(id 256\), which data.pack_documents=true"):
        open_data(options(home, path=str(tmp_path / "set")))
    assert open_data(options(home, path=str(tmp_path / "set"), pack_documents=False)).tokenizer.vocab_size == 257


def test_what_does_not_fit_is_named_with_numbers(home, tmp_path):
    with pytest.raises(DataError, match=r"data.sequence_length=100000 is longer than the data: .*one holds \d+ tokens"):
        open_data(options(home, sequence_length=100_000))
    with pytest.raises(DataError, match=r"data.split='99.9,0.1' of .*one leaves no document for validation: .* 150"):
        open_data(options(home, split="99.9,0.1"))
    with pytest.raises(ConfigError, match="data.global_batch_size=8 does not divide over 3"):
        open_data(options(home), 0, 3)
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_data(options(home, path=str(home / "nowhere")))
    (tmp_path / "set.idx").write_bytes(b"MMID")
    (tmp_path / "set.bin").write_bytes(b"")
    with pytest.raises(DataError, match="set.idx is truncated: 4 bytes"):
        open_data(options(home, path=str(tmp_path / "set")))


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "scatterfold"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "scatterfold"
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"data.cache_dir=.*file/x cannot be written: Not a directory, allowed: a writable"
    ):
        cache_folder(str(tmp_path / "file" / "x"))


def test_epoch_datasets_of_a_part(home):
    open_data(options(home))
    prefix = str(next((home / "cache" / "prepared").glob("one-*.idx"))).removesuffix(".idx")
    dataset = one_epoch_dataset(open_indexed_dataset(prefix), prefix, np.arange(5, 9), 4, 1, 257, 256, home / "indices")
    stored = open_indexed_dataset(prefix)
    expected = sorted(stored[index].tolist() for index in range(5, 9))
    assert len(dataset) == (sum(map(len, expected)) - 1) // 4
