"""Tokenizers: bytes, or a Hugging Face tokenizer.json. Both know how many bytes of text each token stands for."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...kernels.errors import DataError

EOD_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<eod>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|end|>",
)


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are below it.
        eod: id of the document separator.
        byte_lengths: (vocab_size,) int64, bytes of text each id stands for; 0 for `eod`.
    """

    vocab_size: int
    eod: int
    byte_lengths: np.ndarray

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def to_bytes(self, ids: np.ndarray) -> bytes: ...

    def spec(self) -> dict[str, Any]: ...

    def save(self, folder: Path) -> None: ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 text, and an end of document with id 256."""

    vocab_size = 257
    eod = 256

    def __init__(self) -> None:
        self.byte_lengths = np.append(np.ones(256, dtype=np.int64), 0)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD, the end of document and padding ids nothing."""
        return bytes(index for index in ids if index < 256).decode("utf-8", errors="replace")

    def to_bytes(self, ids: np.ndarray) -> bytes:
        """The text that the ids stand for, as bytes."""
        return ids[ids < 256].astype(np.uint8).tobytes()

    def spec(self) -> dict[str, Any]:
        """What `tokenizer_from` needs to build this tokenizer again."""
        return {"kind": "bytes"}

    def save(self, folder: Path) -> None:
        """Nothing to save: the tokenizer has no file."""


class HFTokenizer:
    """A Hugging Face `tokenizer.json`, read with the `tokenizers` library.

    Text is never taken for a special token: "<|endoftext|>" written in a document is encoded as plain text.

    Args:
        path: the file, or a folder that holds one.
        eod: text of the document separator; None for the first of the usual names that the vocabulary has.

    Raises: DataError if the file is missing or broken, or has no document separator.
    """

    def __init__(self, path: str | Path, eod: str | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        self.path = Path(path).expanduser()
        if self.path.is_dir():
            self.path = self.path / "tokenizer.json"
        try:
            content = self.path.read_bytes()
            self._backend = Backend.from_str(content.decode())
            description = json.loads(content)
        except OSError as error:
            raise DataError(f'tokenizer {path}: {error.strerror}, allowed: "bytes" or a tokenizer.json file') from None
        except Exception as error:  # the library raises plain Exception for anything wrong in the file
            reason = " ".join(str(error).split())
            raise DataError(f"tokenizer {self.path} is not a Hugging Face tokenizer.json: {reason}") from None
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._hash = hashlib.sha256(content).hexdigest()
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_token = _find_eod(vocabulary, eod, self.path)
        self.eod = vocabulary[self.eod_token]
        self._bytes = _token_bytes(description, vocabulary, self.vocab_size)
        self._bytes[self.eod] = b""
        self.byte_lengths = np.array([len(piece) for piece in self._bytes], dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; the end of document and padding ids give nothing."""
        kept = [int(index) for index in ids if index != self.eod and index < self.vocab_size]
        return self._backend.decode(kept, skip_special_tokens=False)

    def to_bytes(self, ids: np.ndarray) -> bytes:
        """The text that the ids stand for, as bytes; as long as `byte_lengths` says."""
        return b"".join([self._bytes[index] for index in ids.tolist()])

    def spec(self) -> dict[str, Any]:
        """What `tokenizer_from` needs to build this tokenizer again."""
        return {"kind": "huggingface", "path": str(self.path.resolve()), "sha256": self._hash, "eod": self.eod_token}

    def save(self, folder: Path) -> None:
        """Copy the tokenizer.json into `folder`, where `tokenizer_from` looks first."""
        if self.path.resolve().parent != folder.resolve():
            shutil.copyfile(self.path, folder / "tokenizer.json")


def open_tokenizer(name: str, eod: str | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: "bytes", or the path of a tokenizer.json.

    Raises: DataError if there is none, or "bytes" is given a separator.
    """
    if name != "bytes":
        return HFTokenizer(name, eod)
    if eod is not None:
        raise DataError(
            f"data.eod={eod!r} does not go with the byte tokenizer, whose separator is id 256; allowed: null"
        )
    return ByteTokenizer()


def tokenizer_from(spec: Mapping[str, Any], folder: Path | None = None) -> Tokenizer:
    """Build the tokenizer that `spec()` described.

    Args:
        spec: of a checkpoint or a receipt.
        folder: where `save` put a copy, looked at before the original path.

    Raises: DataError if the file is gone or is another one than that which was described.
    """
    if spec.get("kind") == "bytes":
        return ByteTokenizer()
    if spec.get("kind") != "huggingface":
        raise DataError(f"tokenizer kind={spec.get('kind')!r} is unknown, allowed: bytes, huggingface")
    copies = [] if folder is None else [Path(folder) / "tokenizer.json"]
    path = next((copy for copy in copies if copy.is_file()), Path(spec["path"]))
    tokenizer = HFTokenizer(path, spec["eod"])
    if tokenizer.spec()["sha256"] != spec["sha256"]:
        raise DataError(f"tokenizer {path} has changed: sha256 {tokenizer.spec()['sha256']}, expected {spec['sha256']}")
    return tokenizer


def _find_eod(vocabulary: Mapping[str, int], eod: str | None, path: Path) -> str:
    if eod is not None and eod not in vocabulary:
        raise DataError(f"data.eod={eod!r} is not in the vocabulary of {path}, allowed: one of its tokens")
    found = eod if eod is not None else next((name for name in EOD_NAMES if name in vocabulary), None)
    if found is None:
        raise DataError(f"tokenizer {path} has none of the separators {' '.join(EOD_NAMES)}: set data.eod to its own")
    return found


def _token_bytes(description: Mapping[str, Any], vocabulary: Mapping[str, int], size: int) -> list[bytes]:
    """The bytes of text that each id stands for, by the rules of the tokenizer's decoder.

    Exact for byte-level BPE, and for SentencePiece-like vocabularies (with byte fallback) but for the space that some
    of them put before a text. A WordPiece token that starts a word counts the space before it.
    """
    kinds = _decoder_kinds(description.get("decoder"))
    added = {token["id"]: token["content"] for token in description.get("added_tokens") or []}
    pieces = [b""] * size
    for token, index in vocabulary.items():
        if index in added:
            pieces[index] = added[index].encode()
        elif "ByteLevel" in kinds:
            pieces[index] = _byte_level(token)
        elif "ByteFallback" in kinds and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
            pieces[index] = bytes([int(byte.group(1), 16)])
        elif "WordPiece" in kinds:
            pieces[index] = token[2:].encode() if token.startswith("##") else b" " + token.encode()
        elif "BPEDecoder" in kinds:
            pieces[index] = token.replace("</w>", " ").encode()
        else:
            pieces[index] = token.replace("\u2581", " ").encode()
    return pieces


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    if not decoder:
        return set()
    inner = [_decoder_kinds(part) for part in decoder.get("decoders", [])]
    return {decoder["type"]}.union(*inner)


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:  # not spelt in the byte alphabet: an added token
        return token.encode()


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes: printable Latin-1 stands for itself, the others for U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_CHARACTER = byte_alphabet()
