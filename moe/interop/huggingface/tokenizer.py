"""Tokenizer files of a Hugging Face folder, both ways. Only JSON is read; no code that comes with a model is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....kernels import CheckpointError, DataError
from ...data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer, byte_alphabet
from ..shards import write_json
from .config_json import ConfigJson

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CARRIED = (
    "generation_config.json",
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
END = "<|endoftext|>"


def carried_files(folder: Path) -> dict[str, Path]:
    """Files that go along unread when the model is written again."""
    return {name: folder / name for name in CARRIED if (folder / name).is_file()}


def read_tokenizer(folder: Path, hf: ConfigJson) -> Tokenizer | None:
    """The tokenizer of tokenizer.json; None without one, or without an end of sequence that anything names.

    The end of sequence is what tokenizer_config.json says, else config.json, else one of the usual names. A file that
    `write_tokenizer` made for the byte tokenizer gives that one back.

    Raises: CheckpointError if a file is damaged.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        return None
    described = _read(file)
    if _is_bytes(described):
        return ByteTokenizer()
    vocabulary = _vocabulary(described)
    end = _text(_read(folder / TOKENIZER_CONFIG).get("eos_token") if (folder / TOKENIZER_CONFIG).is_file() else None)
    if end not in vocabulary:
        ids = hf.get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        end = next((token for token, index in vocabulary.items() if index == first), None)
    try:
        return HFTokenizer(file, end)
    except DataError as error:
        if end is None:  # it has no end of sequence that anyone names
            return None
        raise CheckpointError(str(error)) from None


def write_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json with which AutoTokenizer gives the same ids."""
    if isinstance(tokenizer, ByteTokenizer):
        write_json(folder / TOKENIZER, _describe_bytes())
        end = END
    elif isinstance(tokenizer, HFTokenizer):
        tokenizer.save(folder)
        end = tokenizer.eod_token
    else:
        return
    write_json(
        folder / TOKENIZER_CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # as ours: text is never taken for a special token
        },
    )


def _describe_bytes() -> dict[str, Any]:
    """Byte-level BPE without merges: every byte is its own token, the id its value; 256 ends a document."""
    end = {
        "id": ByteTokenizer.eod,
        "content": END,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(byte_alphabet().items(), key=lambda pair: pair[1])),
            "merges": [],
        },
    }


def _is_bytes(described: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json says what `_describe_bytes` says, whoever saved it again since."""
    model, ours = described.get("model") or {}, _describe_bytes()
    added = [(token.get("id"), token.get("content")) for token in described.get("added_tokens") or []]
    vocabulary = {token: index for token, index in (model.get("vocab") or {}).items() if token != END}
    level = described.get("pre_tokenizer") or {}
    return (
        model.get("type") == "BPE"
        and model.get("merges") == []
        and vocabulary == ours["model"]["vocab"]
        and added == [(ByteTokenizer.eod, END)]
        and described.get("normalizer") is None
        and {"ByteLevel", False} == {level.get("type"), level.get("add_prefix_space"), level.get("use_regex")}
    )


def _vocabulary(described: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token, whichever way the model lists them."""
    listed = (described.get("model") or {}).get("vocab") or {}
    if isinstance(listed, list):  # unigram: pairs of a token and its score
        listed = {entry[0]: index for index, entry in enumerate(listed)}
    return {**listed, **{token["content"]: token["id"] for token in described.get("added_tokens") or []}}


def _text(token: Any) -> str | None:
    """A token may be given as text, or as an object that holds it."""
    return token.get("content") if isinstance(token, Mapping) else token


def _read(file: Path) -> dict[str, Any]:
    try:
        described = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(described, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object")
    return described
