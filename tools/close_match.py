"""Suggestions for misspelled words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like `word`; None if none is close.

    Of dotted keys the last part counts, first among keys of the same group: `trainer.stesp` and a bare `stesp` both
    lead to `trainer.steps`.
    """
    names = list(known)
    group, _, leaf = word.rpartition(".")
    inside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == group}
    leaves = {name.rpartition(".")[2]: name for name in names}
    whole = {name: name for name in names}
    for sought, among, cutoff in ((leaf, inside, 0.6), (word, whole, 0.8), (leaf, leaves, 0.75)):
        matches = difflib.get_close_matches(sought, list(among), n=1, cutoff=cutoff)
        if matches:
            return among[matches[0]]
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A phrase to append to a message, or nothing."""
    match = closest(str(word), known)
    return f" (did you mean {match}?)" if match else ""
