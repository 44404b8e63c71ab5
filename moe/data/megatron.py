"""megatron-core's datasets, imported late and quietly: the import takes seconds and warns of packages we do not use."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np


@cache
def _modules() -> tuple[ModuleType, ModuleType]:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import helpers, indexed_dataset
    return helpers, indexed_dataset


def indexed_dataset_builder(bin_path: str, dtype: type[np.integer]) -> Any:
    """A `megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder`."""
    return _modules()[1].IndexedDatasetBuilder(bin_path, dtype=dtype)


def open_indexed_dataset(prefix: str) -> Any:
    """A `megatron.core.datasets.indexed_dataset.IndexedDataset`, memory-mapped."""
    return _modules()[1].IndexedDataset(prefix, multimodal=False, mmap=True)


def blending_indices(weights: list[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Interleave corpora by weight, as megatron-core's BlendedDataset does.

    Returns: (size,) the corpus of each position, and (size,) which sample of that corpus it is.
    """
    corpus = np.zeros(size, dtype=np.int16)
    sample = np.zeros(size, dtype=np.int64)
    normal = np.array(weights, dtype=np.float64) / np.sum(weights)
    _modules()[0].build_blending_indices(corpus, sample, normal, len(weights), size, False)
    return corpus, sample


def one_epoch_dataset(*args: Any, **kwargs: Any) -> Any:
    """An `EpochDataset` (see megatron_epochs.py)."""
    _modules()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from .megatron_epochs import EpochDataset
    return EpochDataset.create(*args, **kwargs)
