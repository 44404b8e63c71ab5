"""One epoch of a corpus as a megatron-core GPTDataset. Imports megatron-core: reach it through megatron.py."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from .cache import digest, locked, writing

IN_MEMORY_SAMPLES = 1 << 20  # a smaller index is built in milliseconds; a larger one is kept on disk and mapped


@dataclass(frozen=True)
class TokenizerFacts:
    """What GPTDataset asks of a tokenizer."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "eod": self.eod}


class EpochDataset(GPTDataset):
    """A GPTDataset of exactly one epoch whose index any number of processes may build at once.

    GPTDataset has only rank 0 of torch.distributed build an index and needs a barrier before the others look. Epochs
    here are opened whenever training reaches them, in a background thread, where no barrier may run; so an index is
    built in memory, or, when it is large, by whichever process comes first, behind a file lock. The order is the one
    that GPTDataset gives for num_samples=None and the same seed.
    """

    dataset: Any

    @classmethod
    def create(
        cls,
        dataset: Any,
        prefix: str,
        sequences: np.ndarray,
        sequence_length: int,
        seed: int,
        vocab_size: int,
        eod: int,
        index_folder: Path,
    ) -> EpochDataset:
        """
        Args:
            dataset: megatron-core's IndexedDataset.
            prefix: of its files.
            sequences: (n,) which of its sequences the epoch goes through.
            seed: of the order, below 2**32.
            vocab_size, eod: of the tokenizer.
            index_folder: where large indices are kept.
        """
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=([prefix], None),
            split="1",
            path_to_cache=str(index_folder),
            tokenizer=TokenizerFacts(vocab_size, eod),  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        return cls(dataset, prefix, sequences, None, Split.train, config)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths = self.dataset.sequence_lengths
        samples = (int(lengths[self.indices].sum(dtype=np.int64)) - 1) // self.config.sequence_length
        if samples <= IN_MEMORY_SAMPLES:
            return self._build_indices()
        state = os.stat(f"{self.dataset_path}.idx")
        span = [int(self.indices[0]), int(self.indices[-1]), len(self.indices)]
        name = digest([self.unique_description, span, state.st_size, state.st_mtime_ns])
        folder = Path(self.config.path_to_cache or "") / name
        with writing(folder, field="data.cache_dir"), locked(folder.parent, name):
            if not folder.is_dir():
                self._write_indices(folder)
        document, sample, shuffle = (
            np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("document", "sample", "shuffle")
        )
        return document, sample, shuffle

    def _write_indices(self, folder: Path) -> None:
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            temporary.mkdir()
            for part, index in zip(("document", "sample", "shuffle"), self._build_indices()):
                np.save(temporary / f"{part}.npy", index)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths = np.array(self.dataset.sequence_lengths)
        tokens = int(lengths[self.indices].sum(dtype=np.int64))
        random = np.random.RandomState(self.config.random_seed)
        document = self.indices.astype(np.int32)
        random.shuffle(document)
        sample = helpers.build_sample_idx(lengths, document, self.config.sequence_length, 1, tokens, True, True)
        shuffle = np.arange(len(sample) - 1, dtype=np.uint32 if len(sample) < 2**32 - 1 else np.int64)
        random.shuffle(shuffle)
        return document, sample, shuffle
