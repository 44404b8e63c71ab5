"""Models in the format of Hugging Face, both ways."""

from .architectures import ARCHITECTURES
from .read import is_huggingface, open_huggingface
from .write import choose_architecture, write_huggingface

__all__ = ["ARCHITECTURES", "choose_architecture", "is_huggingface", "open_huggingface", "write_huggingface"]
