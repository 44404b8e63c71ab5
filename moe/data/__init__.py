"""Data: text to indexed datasets, and indexed datasets to batches."""

from .baselines import measure_baselines
from .batches import MASKED, Batch, Batches, ValidBatches
from .open import Data, open_data
from .prepare import PrepareReceipt, PrepareSettings, prepare
from .settings import DataSettings
from .tokenizer import ByteTokenizer, HFTokenizer, Tokenizer, open_tokenizer, tokenizer_from

__all__ = [
    "MASKED",
    "Batch",
    "Batches",
    "ByteTokenizer",
    "Data",
    "DataSettings",
    "HFTokenizer",
    "PrepareReceipt",
    "PrepareSettings",
    "Tokenizer",
    "ValidBatches",
    "measure_baselines",
    "open_data",
    "open_tokenizer",
    "prepare",
    "tokenizer_from",
]
