"""Models in folders: every format opens as a `StoredModel` and is written from one."""

from .open import open_model
from .stored import StoredModel
from .write import WriteReceipt, write_model

__all__ = ["StoredModel", "WriteReceipt", "open_model", "write_model"]
